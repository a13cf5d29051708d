// Rotary position embedding (Su et al. 2021).
//
//   rope_angles   cosines and sines (T, n) of position times frequency, times `amplitude`           NumPy: rope_angles
//   rotate        out = x (T, H, dim), the first 2n numbers of a head rotated by the row's n angles    NumPy: rotate
//
// Launch: rope_angles ceil(T * n / 256) blocks of 256; rotate (T, ceil(H * dim / 2048)) blocks of 128.
#include "rows.cuh"

extern "C" __global__ void rope_angles(const int* positions, const float* frequencies, float* cosines, float* sines,
                                       int rows, int pairs, float amplitude) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows * pairs) return;
  const float angle = static_cast<float>(positions[i / pairs]) * frequencies[i % pairs];
  cosines[i] = cosf(angle) * amplitude;
  sines[i] = sinf(angle) * amplitude;
}

// Rotate eight pairs of a head; number i is paired with i + n, or 2i with 2i + 1 if INTERLEAVED.
template <bool INTERLEAVED>
__device__ inline void rotate_eight(const row* from, const float* cosines, const float* sines, row* to, int eight,
                                    int pairs) {
  const int first = INTERLEAVED ? 16 * eight : 8 * eight, second = INTERLEAVED ? first + 8 : first + pairs;
  const Eight<row> held_first = read8(from + first), held_second = read8(from + second);
  const Eight<float> held_cosines = read8(cosines + 8 * eight), held_sines = read8(sines + 8 * eight);
  float numbers[16], rotated[16], cosine[8], sine[8];
  unpack8(held_first, numbers), unpack8(held_second, numbers + 8);
  unpack8(held_cosines, cosine), unpack8(held_sines, sine);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int a = INTERLEAVED ? 2 * i : i, b = INTERLEAVED ? 2 * i + 1 : i + 8;
    rotated[a] = numbers[a] * cosine[i] - numbers[b] * sine[i];
    rotated[b] = numbers[b] * cosine[i] + numbers[a] * sine[i];
  }
  store8(to + first, 8, rotated), store8(to + second, 8, rotated + 8);
}

__device__ inline void rotate_one(const row* from, const float* cosines, const float* sines, row* to, int pair,
                                  int pairs, int interleaved) {
  const int first = interleaved ? 2 * pair : pair, second = interleaved ? first + 1 : pair + pairs;
  const float a = widen(from[first]), b = widen(from[second]);
  narrow(a * cosines[pair] - b * sines[pair], to + first);
  narrow(b * cosines[pair] + a * sines[pair], to + second);
}

// `x` has strides in numbers; `out` is contiguous. A thread rotates eight pairs or copies eight numbers at a time; one
// where n or a stride is no multiple of eight.
extern "C" __global__ void rotate(const row* x, const float* cosines, const float* sines, row* out, int heads, int dim,
                                  int pairs, long long token_stride, long long head_stride, int interleaved) {
  const long long token = blockIdx.x;
  x += token * token_stride, cosines += token * pairs, sines += token * pairs;
  const bool by_eights = pairs % 8 == 0 && dim % 8 == 0 && head_stride % 8 == 0 && is_aligned(x);
  const int size = by_eights ? 8 : 1, rotations = pairs / size, tasks = (dim - pairs) / size;
  for (int task = blockIdx.y * blockDim.x + threadIdx.x; task < heads * tasks; task += gridDim.y * blockDim.x) {
    const int head = task / tasks, own = task - head * tasks;
    const row* from = x + head * head_stride;
    row* to = out + (token * heads + head) * dim;
    if (own >= rotations) {
      const int column = (own + rotations) * size;
      if (by_eights) copy8(from + column, to + column, 8);
      else to[column] = from[column];
    } else if (!by_eights) rotate_one(from, cosines, sines, to, own, pairs, interleaved);
    else if (interleaved) rotate_eight<true>(from, cosines, sines, to, own, pairs);
    else rotate_eight<false>(from, cosines, sines, to, own, pairs);
  }
}
