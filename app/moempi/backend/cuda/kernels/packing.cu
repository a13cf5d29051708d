// Rows gathered by an index, and answers added up.
//
//   take_rows   out[i] = rows[index[i]], or rows[i] without an index            NumPy: embed, take_rows, pack, unpack
//   combine     out[t] = sum over k, in order, of weights[t, k] * wire[places[t, k]]            NumPy: combine
//
// A block writes one row (D numbers), eight numbers a thread. Rows that come or go through pinned host memory pass the
// bus once. Launch: n blocks of ceil(D / 8) threads, rounded up to whole warps, at most 1,024.
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

extern "C" __global__ void combine(const row* wire, const int* places, const float* weights, row* out, int slots,
                                   int width) {
  const long long token = blockIdx.x;
  for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
    float total[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (int slot = 0; slot < slots; ++slot) {
      const float weight = weights[token * slots + slot];
      float numbers[8];
      load8(wire + static_cast<long long>(places[token * slots + slot]) * width + column, width - column, numbers);
      for (int i = 0; i < 8; ++i) total[i] += weight * numbers[i];
    }
    store8(out + token * width + column, width - column, total);
  }
}
