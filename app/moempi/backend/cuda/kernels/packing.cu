// Rows selected by an index, and weighted sums of experts' outputs.
//
//   take_rows   out[i] = rows[index[i]], or rows[i] without an index            NumPy: embed, take_rows, pack, unpack
//   combine     out[t] = sum over k, in order, of weights[t, k] * buffer[output_rows[t, k]]     NumPy: combine
//
// Shapes: out (n, D), index (n), output_rows and weights (n, K). A block writes one row, eight numbers per thread. Rows
// in pinned host memory cross the bus once.
// Launch: n blocks of ceil(D / 8) threads, rounded up to whole warps, at most 1,024.
#include "rows.cuh"

extern "C" __global__ void take_rows(const row* rows, const int* index, row* out, int width) {
  const long long from = (index ? index[blockIdx.x] : static_cast<long long>(blockIdx.x)) * width;
  const long long to = static_cast<long long>(blockIdx.x) * width;
  for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
    float numbers[8];
    load8(rows + from + column, width - column, numbers);
    store8(out + to + column, width - column, numbers);
  }
}

extern "C" __global__ void combine(const row* buffer, const int* output_rows, const float* weights, row* out,
                                   int slots, int width) {
  const long long token = blockIdx.x;
  for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
    float total[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (int slot = 0; slot < slots; ++slot) {
      const float weight = weights[token * slots + slot];
      float numbers[8];
      const long long from = static_cast<long long>(output_rows[token * slots + slot]) * width + column;
      load8(buffer + from, width - column, numbers);
      for (int i = 0; i < 8; ++i) total[i] += weight * numbers[i];
    }
    store8(out + token * width + column, width - column, total);
  }
}
