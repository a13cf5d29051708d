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

// The weights of norms are float, whatever the rows are, if FLOAT32_WEIGHTS is defined.
#ifdef FLOAT32_WEIGHTS
typedef float norm_weight;
#else
typedef row norm_weight;
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

// Eight numbers as they are stored. A thread fetches several eights before it unpacks one, so their loads overlap.
template <class Number>
struct Eight {
  uint4 words[sizeof(Number) / 2];
};

// Eight numbers at an address that is aligned to 16 bytes.
template <class Number>
__device__ inline Eight<Number> read8(const Number* from) {
  Eight<Number> eight;
#pragma unroll
  for (int word = 0; word < sizeof(Number) / 2; ++word) eight.words[word] = reinterpret_cast<const uint4*>(from)[word];
  return eight;
}

__device__ inline Eight<unsigned short> pack8(const unsigned short* numbers) {
  Eight<unsigned short> eight;
  eight.words[0].x = numbers[0] | static_cast<unsigned>(numbers[1]) << 16;
  eight.words[0].y = numbers[2] | static_cast<unsigned>(numbers[3]) << 16;
  eight.words[0].z = numbers[4] | static_cast<unsigned>(numbers[5]) << 16;
  eight.words[0].w = numbers[6] | static_cast<unsigned>(numbers[7]) << 16;
  return eight;
}

__device__ inline Eight<float> pack8(const float* numbers) {
  Eight<float> eight;
#pragma unroll
  for (int word = 0; word < 2; ++word) {
    eight.words[word].x = __float_as_uint(numbers[4 * word]);
    eight.words[word].y = __float_as_uint(numbers[4 * word + 1]);
    eight.words[word].z = __float_as_uint(numbers[4 * word + 2]);
    eight.words[word].w = __float_as_uint(numbers[4 * word + 3]);
  }
  return eight;
}

__device__ inline void unpack8(const Eight<unsigned short>& eight, float* numbers) {
  const unsigned words[4] = {eight.words[0].x, eight.words[0].y, eight.words[0].z, eight.words[0].w};
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    numbers[2 * word] = __uint_as_float(words[word] << 16);
    numbers[2 * word + 1] = __uint_as_float(words[word] & 0xffff0000u);
  }
}

__device__ inline void unpack8(const Eight<float>& eight, float* numbers) {
#pragma unroll
  for (int word = 0; word < 2; ++word) {
    numbers[4 * word] = __uint_as_float(eight.words[word].x);
    numbers[4 * word + 1] = __uint_as_float(eight.words[word].y);
    numbers[4 * word + 2] = __uint_as_float(eight.words[word].z);
    numbers[4 * word + 3] = __uint_as_float(eight.words[word].w);
  }
}

// Eight numbers at any address; numbers from `left` on do not exist and become zero.
template <class Number>
__device__ inline Eight<Number> fetch8(const Number* from, long long left) {
  if (left >= 8 && is_aligned(from)) return read8(from);
  Number numbers[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) numbers[i] = i < left ? from[i] : Number(0);
  return pack8(numbers);
}

template <class Number>
__device__ inline void load8(const Number* from, long long left, float* numbers) {
  unpack8(fetch8(from, left), numbers);
}

// Fetch COUNT eights of a row, blockDim.x eights apart, from column `first` on; beyond `width` they are zero.
template <int COUNT, class Number>
__device__ inline void fetch_eights(Eight<Number>* held, const Number* from, int first, int width) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int column = first + i * static_cast<int>(blockDim.x) * 8;
    held[i] = fetch8(from + column, width - column);
  }
}

// Write the first `left` of eight numbers.
__device__ inline void store8(unsigned short* to, long long left, const float* numbers) {
  if (left >= 8 && is_aligned(to)) {
    uint4 packed;
    packed.x = bfloat16_pair(numbers[0], numbers[1]), packed.y = bfloat16_pair(numbers[2], numbers[3]);
    packed.z = bfloat16_pair(numbers[4], numbers[5]), packed.w = bfloat16_pair(numbers[6], numbers[7]);
    *reinterpret_cast<uint4*>(to) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < left) to[i] = bfloat16_bits(numbers[i]);
  }
}

__device__ inline void store8(float* to, long long left, const float* numbers) {
  if (left >= 8 && is_aligned(to)) {
    const Eight<float> packed = pack8(numbers);
    reinterpret_cast<uint4*>(to)[0] = packed.words[0];
    reinterpret_cast<uint4*>(to)[1] = packed.words[1];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < left) to[i] = numbers[i];
  }
}

// Copy the first `left` of eight numbers, whatever their bits mean.
__device__ inline void copy8(const row* from, row* to, int left) {
  if (left >= 8 && is_aligned(from) && is_aligned(to)) {
    const Eight<row> eight = read8(from);
#pragma unroll
    for (int word = 0; word < sizeof(row) / 2; ++word) reinterpret_cast<uint4*>(to)[word] = eight.words[word];
  } else {
    for (int i = 0; i < 8 && i < left; ++i) to[i] = from[i];
  }
}

// A row is copied in segments: a block of SEGMENT_THREADS copies SEGMENT_BYTES, and each thread has several 16-byte
// loads in flight.
const int SEGMENT_THREADS = 128, SEGMENT_LOADS = 4;
const int SEGMENT_BYTES = SEGMENT_THREADS * SEGMENT_LOADS * 16;  // equals SEGMENT_BYTES of cuda/launches.py

// Copy segment `segment` of a row of `width` numbers.
__device__ inline void copy_segment(const row* from, row* to, int segment, int width) {
  const int first = segment * (SEGMENT_BYTES / static_cast<int>(sizeof(row)));
  const int count = min(width - first, SEGMENT_BYTES / static_cast<int>(sizeof(row)));
  from += first, to += first;
  const int words = count * static_cast<int>(sizeof(row)) / 16;
  if (is_aligned(from) && is_aligned(to) && count * sizeof(row) % 16 == 0) {
    uint4 held[SEGMENT_LOADS];
#pragma unroll
    for (int load = 0; load < SEGMENT_LOADS; ++load) {
      const int word = load * SEGMENT_THREADS + threadIdx.x;
      if (word < words) held[load] = reinterpret_cast<const uint4*>(from)[word];
    }
#pragma unroll
    for (int load = 0; load < SEGMENT_LOADS; ++load) {
      const int word = load * SEGMENT_THREADS + threadIdx.x;
      if (word < words) reinterpret_cast<uint4*>(to)[word] = held[load];
    }
  } else {
    for (int i = threadIdx.x; i < count; i += SEGMENT_THREADS) to[i] = from[i];
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
__device__ inline long long vector_start(unsigned vector, unsigned heads, long long token_stride,
                                         long long head_stride) {
  const unsigned token = heads == 1 ? vector : vector / heads;
  return token * token_stride + (vector - token * heads) * head_stride;
}
