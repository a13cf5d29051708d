// Programmatic dependent launch, from compute capability 9.0 on. tests/simt/simt.h has CPU twins of the same names.
//
// A kernel that is launched `early` may begin when all blocks of the kernel before it in its queue have called
// start_successor or ended. It reads nothing that the kernels before it write, and writes nothing, until
// await_predecessors returns: before, it may read weights, which no kernel writes. Source: PTX ISA, "griddepcontrol".
#pragma once

#ifdef __CUDACC__
__device__ inline void start_successor() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ inline void await_predecessors() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#endif
