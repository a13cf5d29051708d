// Rotary position embedding (Su et al. 2021).
//
//   rope_angles   cosines and sines (T, n) of position times frequency, times `amplitude`      NumPy: rope_angles
//   rotate        the first 2n numbers of every head of x (T, H, dim) by the row's n angles    NumPy: rotate
//
// Launch: rope_angles ceil(T * n / 256) blocks of 256; rotate T blocks, threads as packing for H * dim / 2 numbers.
#include "rows.cuh"

extern "C" __global__ void rope_angles(const int* positions, const float* frequencies, float* cosines, float* sines,
                                       int rows, int pairs, float amplitude) {
  const int place = blockIdx.x * blockDim.x + threadIdx.x;
  if (place >= rows * pairs) return;
  const float angle = static_cast<float>(positions[place / pairs]) * frequencies[place % pairs];
  cosines[place] = cosf(angle) * amplitude;
  sines[place] = sinf(angle) * amplitude;
}

// `x` has strides in numbers; `out` is contiguous. Number i turns with i + n, or with its neighbour if `interleaved`.
extern "C" __global__ void rotate(const row* x, const float* cosines, const float* sines, row* out, int heads, int dim,
                                  int pairs, long long token_stride, long long head_stride, int interleaved) {
  const long long token = blockIdx.x;
  const int turns = dim - pairs;  // of a head: n pairs, and the numbers that stay
  for (int task = threadIdx.x; task < heads * turns; task += blockDim.x) {
    const int head = task / turns, pair = task % turns;
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
