// Rows selected by an index, and weighted sums of experts' outputs.
//
//   take_rows   out[i] = rows[index[i]], or rows[i] without an index            NumPy: embed, take_rows, pack, unpack
//   take_rows_over_bus   the same, where `rows` or `out` is in pinned host memory
//   combine     out[t] = sum over k, in order, of weights[t, k] * buffer[output_rows[t, k]]; then `first` and
//               `second`, if they are not null, are added; each sum is rounded    NumPy: combine
//
// Shapes: out, first and second (n, D), index (n), output_rows and weights (n, K). Rows in pinned host memory cross the
// bus once.
// Launch: take_rows (n, segments of a row) blocks of SEGMENT_THREADS, take_rows_over_bus fewer than n; combine (n, ceil(D / 1024)) blocks of 128, eight
// numbers per thread.
#include "combination.cuh"

extern "C" __global__ void take_rows(const row* rows, const int* index, row* out, int width) {
  const long long from = index ? index[blockIdx.x] : static_cast<long long>(blockIdx.x);
  copy_segment(rows + from * width, out + static_cast<long long>(blockIdx.x) * width, blockIdx.y, width);
}

extern "C" __global__ void take_rows_over_bus(const row* rows, const int* index, row* out, int count, int width) {
  for (long long to = blockIdx.x; to < count; to += gridDim.x) {
    const long long from = index ? index[to] : to;
    copy_segment(rows + from * width, out + to * width, blockIdx.y, width);
  }
}

extern "C" __global__ void combine(const row* buffer, const int* output_rows, const float* weights, const row* first,
                                   const row* second, row* out, int slots, int width) {
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
  float total[8];
  combine_eight(total, {buffer, output_rows, weights, first, second, slots, width}, blockIdx.x, column);
  if (column < width) store8(out + static_cast<long long>(blockIdx.x) * width + column, width - column, total);
}
