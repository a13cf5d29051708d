// Rotary position embedding (Su et al. 2021).
//
//   rope_angles   cosines and sines (T, n) of position times frequency, times `amplitude`           NumPy: rope_angles
//   rotate        out = x (T, H, dim), the first 2n numbers of a head rotated by the row's n angles    NumPy: rotate
//
// Launch: rope_angles ceil(T * n / 256) blocks of 256; rotate T blocks, threads as in packing.cu for H * dim numbers.
#include "rows.cuh"

extern "C" __global__ void rope_angles(const int* positions, const float* frequencies, float* cosines, float* sines,
                                       int rows, int pairs, float amplitude) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows * pairs) return;
  const float angle = static_cast<float>(positions[i / pairs]) * frequencies[i % pairs];
  cosines[i] = cosf(angle) * amplitude;
  sines[i] = sinf(angle) * amplitude;
}

// `x` has strides in numbers; `out` is contiguous. Number i is paired with i + n; if `interleaved`, 2i with 2i + 1.
extern "C" __global__ void rotate(const row* x, const float* cosines, const float* sines, row* out, int heads, int dim,
                                  int pairs, long long token_stride, long long head_stride, int interleaved) {
  const long long token = blockIdx.x;
  const int tasks = dim - pairs;  // per head: n pairs, and the numbers that are copied
  for (int task = threadIdx.x; task < heads * tasks; task += blockDim.x) {
    const int head = task / tasks, pair = task % tasks;
    const row* from = x + token * token_stride + head * head_stride;
    row* to = out + (token * heads + head) * dim;
    if (pair < pairs) {
      const int first = interleaved ? 2 * pair : pair, second = interleaved ? first + 1 : pair + pairs;
      const float cosine = cosines[token * pairs + pair], sine = sines[token * pairs + pair];
      const float a = widen(from[first]), b = widen(from[second]);
      narrow(a * cosine - b * sine, to + first);
      narrow(b * cosine + a * sine, to + second);
    } else {
      to[pair + pairs] = from[pair + pairs];
    }
  }
}
