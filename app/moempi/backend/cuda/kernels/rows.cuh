// Shared by all kernels: rows in the run's precision, read and written eight numbers at a time, and reductions.
//
// A number of type `row` is a bfloat16 (its 16 bits), or a float if FLOAT32_ROWS is defined. Arithmetic is in float; a
// number is rounded once, when it is stored, to the nearest, ties to even, as `moempi.arrays` rounds.
#pragma once

#ifdef FLOAT32_ROWS
typedef float row;
#else
typedef unsigned short row;
#endif

const int WARP_THREADS = 32;
const unsigned FULL_WARP = 0xffffffffu;

__device__ inline float infinity() { return __uint_as_float(0x7f800000u); }

__device__ inline float widen(float number) { return number; }
__device__ inline float widen(unsigned short bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }

#ifdef __CUDACC__  // tests/simt/simt.h has CPU twins of the same names
// The bits of a number rounded to bfloat16; NaN stays NaN.
__device__ inline unsigned short bfloat16_bits(float number) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(number));
  return bits;
}

// Two numbers rounded to bfloat16, `low` in the lower half.
__device__ inline unsigned bfloat16_pair(float low, float high) {
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
#endif

__device__ inline void narrow(float number, float* out) { *out = number; }
__device__ inline void narrow(float number, unsigned short* out) { *out = bfloat16_bits(number); }

// The number rounded to the precision of rows.
__device__ inline float stored(float number) {
  row kept;
  narrow(number, &kept);
  return widen(kept);
}

__device__ inline bool is_aligned(const void* address) {
  return (reinterpret_cast<unsigned long long>(address) & 15u) == 0;
}

// Read eight numbers at `from`; numbers from `left` on do not exist and become zero.
__device__ inline void load8(const unsigned short* from, long long left, float* numbers) {
  if (left >= 8 && is_aligned(from)) {
    const uint4 packed = *reinterpret_cast<const uint4*>(from);
    const unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
    for (int word = 0; word < 4; ++word) {
      numbers[2 * word] = __uint_as_float(words[word] << 16);
      numbers[2 * word + 1] = __uint_as_float(words[word] & 0xffff0000u);
    }
  } else {
    for (int i = 0; i < 8; ++i) numbers[i] = i < left ? widen(from[i]) : 0.0f;
  }
}

__device__ inline void load8(const float* from, long long left, float* numbers) {
  if (left >= 8 && is_aligned(from)) {
    const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
    numbers[0] = low.x, numbers[1] = low.y, numbers[2] = low.z, numbers[3] = low.w;
    numbers[4] = high.x, numbers[5] = high.y, numbers[6] = high.z, numbers[7] = high.w;
  } else {
    for (int i = 0; i < 8; ++i) numbers[i] = i < left ? from[i] : 0.0f;
  }
}

// Write the first `left` of eight numbers.
__device__ inline void store8(unsigned short* to, long long left, const float* numbers) {
  if (left >= 8 && is_aligned(to)) {
    unsigned words[4];
    for (int word = 0; word < 4; ++word)
      words[word] = bfloat16_bits(numbers[2 * word]) | static_cast<unsigned>(bfloat16_bits(numbers[2 * word + 1])) << 16;
    uint4 packed;
    packed.x = words[0], packed.y = words[1], packed.z = words[2], packed.w = words[3];
    *reinterpret_cast<uint4*>(to) = packed;
  } else {
    for (int i = 0; i < 8 && i < left; ++i) to[i] = bfloat16_bits(numbers[i]);
  }
}

__device__ inline void store8(float* to, long long left, const float* numbers) {
  if (left >= 8 && is_aligned(to)) {
    float4 low, high;
    low.x = numbers[0], low.y = numbers[1], low.z = numbers[2], low.w = numbers[3];
    high.x = numbers[4], high.y = numbers[5], high.z = numbers[6], high.w = numbers[7];
    reinterpret_cast<float4*>(to)[0] = low;
    reinterpret_cast<float4*>(to)[1] = high;
  } else {
    for (int i = 0; i < 8 && i < left; ++i) to[i] = numbers[i];
  }
}

__device__ inline float warp_sum(float value) {
  for (int apart = WARP_THREADS / 2; apart; apart /= 2) value += __shfl_xor_sync(FULL_WARP, value, apart);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int apart = WARP_THREADS / 2; apart; apart /= 2) value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, apart));
  return value;
}

// The sum or maximum over the threads of a block; all threads must call it, and all get the result.
template <bool IS_SUM>
__device__ inline float over_block(float value) {
  __shared__ float of_warp[WARP_THREADS];
  const int lane = threadIdx.x % WARP_THREADS, warps = blockDim.x / WARP_THREADS;
  value = IS_SUM ? warp_sum(value) : warp_max(value);
  __syncthreads();  // the result of an earlier call has been read
  if (lane == 0) of_warp[threadIdx.x / WARP_THREADS] = value;
  __syncthreads();
  value = lane < warps ? of_warp[lane] : (IS_SUM ? 0.0f : -infinity());
  return IS_SUM ? warp_sum(value) : warp_max(value);
}

__device__ inline float block_sum(float value) { return over_block<true>(value); }
__device__ inline float block_max(float value) { return over_block<false>(value); }

// Offset of vector `vector` in an array (tokens, heads, width) of which only the last axis is contiguous.
__device__ inline long long vector_start(long long vector, int heads, long long token_stride, long long head_stride) {
  return vector / heads * token_stride + vector % heads * head_stride;
}
