// The asynchronous matrix instructions of a warpgroup (four warps) on compute capability 9.0. tests/simt/simt.h has CPU
// twins of the same names.
//
// A warpgroup multiplies a (64 x 16, in registers or shared memory) with b (16 x N, in shared memory) and adds to c
// (64 x N, in registers).
// Warp w has rows 16 w to 16 w + 15 of a and c, in the fragments of tensor_core.cuh; c[j] has columns 8 j to 8 j + 7.
// The instructions between `begin_products` and `end_products` are a group, which runs in the background. Its registers
// may be used again after `await_products_but<N>`, which waits for all groups but the last N.
//
// Shared memory holds panels of 64 numbers (128 bytes) a row, aligned to 1,024 bytes. The 16-byte pieces of a row are
// permuted (128-byte swizzle), so that the eight rows read together are in different banks; see `panel_offset`.
// Source of the layouts: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", matrix descriptor.
#pragma once
#include "tensor_core.cuh"

const int PANEL_WIDTH = 64, PANEL_ROW_BYTES = 128, SWIZZLE_ROWS = 8;
const unsigned long long SWIZZLE_128 = 1ull << 62;

// Selects the instruction of a width N.
template <int N>
struct Width {};

// Number of the 16-bit word at which piece `eight` (eight numbers) of a row is, for rows of several panels of `rows` rows.
__device__ inline int panel_offset(int row, int eight, int rows) {
  const int panel = eight / 8, piece = eight % 8 ^ row % SWIZZLE_ROWS;
  return (panel * rows + row) * PANEL_WIDTH + piece * 8;
}

// Descriptor of a matrix that begins at a shared address: bytes between panels, and between groups of eight rows.
__device__ inline unsigned long long describe_panels(unsigned address, int panel_bytes) {
  const unsigned long long between_panels = panel_bytes >> 4, between_groups = SWIZZLE_ROWS * PANEL_ROW_BYTES >> 4;
  return (address >> 4 & 0x3fffu) | between_panels << 16 | between_groups << 32 | SWIZZLE_128;
}

#ifdef __CUDACC__
__device__ inline unsigned shared_address(const void* from) {
  return static_cast<unsigned>(__cvta_generic_to_shared(from));
}

// Make copies to shared memory that this thread has waited for visible to the matrix instructions.
__device__ inline void publish_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ inline void await_products_but() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define C4(c, j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define C16(c, j) C4(c, j), C4(c, j + 1), C4(c, j + 2), C4(c, j + 3)
#define C32(c, j) C16(c, j), C16(c, j + 4)

// c (64 x 64) += a * b if `adds`, else c = a * b; the rows of b' are panel rows (b is k-major).
__device__ inline void multiply_rows(float (*c)[4], const unsigned* a, unsigned long long b, int adds) {
  asm volatile(
      "{ .reg .pred adds; setp.ne.b32 adds, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
      "%30,%31}, {%32,%33,%34,%35}, %36, adds, 1, 1, 0; }"
      : C32(c, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));
}

// c (64 x 64) += a * b; the rows of b are panel rows.
__device__ inline void multiply_columns(float (*c)[4], const unsigned* a, unsigned long long b, Width<64>) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
      "%30,%31}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
      : C32(c, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// c (64 x 128) += a * b; the rows of b are rows of two panels.
__device__ inline void multiply_columns(float (*c)[4], const unsigned* a, unsigned long long b, Width<128>) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
      "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,"
      "%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
      : C32(c, 0), C32(c, 8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// c (64 x N) += a * b, both in shared memory: the rows of a and of b' are panel rows.
__device__ inline void multiply_shared(float (*c)[4], unsigned long long a, unsigned long long b, Width<16>) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, 1, 1, 1, 0, 0;"
      : C4(c, 0), C4(c, 1)
      : "l"(a), "l"(b));
}

__device__ inline void multiply_shared(float (*c)[4], unsigned long long a, unsigned long long b, Width<32>) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, 1, 1, 1, 0, 0;"
      : C16(c, 0)
      : "l"(a), "l"(b));
}

__device__ inline void multiply_shared(float (*c)[4], unsigned long long a, unsigned long long b, Width<64>) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
      "%30,%31}, %32, %33, 1, 1, 1, 0, 0;"
      : C32(c, 0)
      : "l"(a), "l"(b));
}
#undef C4
#undef C16
#undef C32
#endif
