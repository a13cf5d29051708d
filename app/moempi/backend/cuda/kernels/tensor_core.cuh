// The matrix instructions of a warp. tests/simt/simt.h has CPU twins of the same names.
//
// Warp lane l has g = l / 4 and t = l % 4. Fragments hold two bfloat16 per register:
//   a (16 x 16): rows g and g + 8; columns 2t, 2t + 1, 2t + 8, 2t + 9
//   b (16 x 8): rows 2t, 2t + 1, 2t + 8, 2t + 9; column g
//   c (16 x 8, float): rows g and g + 8; columns 2t, 2t + 1
#pragma once
#include "rows.cuh"

#ifdef __CUDACC__
// c += a * b
__device__ inline void multiply_add(float* c, const unsigned* a, const unsigned* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Load four 8 x 8 matrices from shared memory; warp lanes 8i to 8i + 7 give the addresses of the rows of matrix i. A
// warp lane gets row g, columns 2t and 2t + 1 of each; load_transposed gives it rows 2t and 2t + 1, column g.
__device__ inline void load_matrices(unsigned* to, const unsigned short* from) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

__device__ inline void load_transposed(unsigned* to, const unsigned short* from) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// Start to copy 16 bytes to shared memory. `end_copies` makes a group of the copies that this thread has started since
// the last group; `await_copies` waits for all copies of this thread, `await_groups_but<N>` for all groups but the last N.
__device__ inline void begin_copy(unsigned short* to, const unsigned short* from) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

// The same for memory that is mostly read once: it leaves the L2 cache first.
__device__ inline void begin_copy_once(unsigned short* to, const unsigned short* from) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "l"(policy)
               : "memory");
}

__device__ inline void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ inline void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ inline void await_groups_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 2 to the power of a number, to about 22 bits.
__device__ inline float fast_exp2(float number) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(number));
  return power;
}

#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(1024) type name[]
#endif
