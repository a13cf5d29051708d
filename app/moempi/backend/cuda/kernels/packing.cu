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
#include "rows.cuh"

const int SLOTS_IN_FLIGHT = 8;

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

// total += weight * the eight numbers
__device__ inline void add_weighted(float* total, float weight, const Eight<row>& eight) {
  float numbers[8];
  unpack8(eight, numbers);
#pragma unroll
  for (int i = 0; i < 8; ++i) total[i] += weight * numbers[i];
}

// Round the eight numbers of total, then add those of an addend, which may be null.
__device__ inline void add_rounded(float* total, const row* addend, long long at, int left) {
  if (!addend) return;
  float numbers[8];
  load8(addend + at, left, numbers);
#pragma unroll
  for (int i = 0; i < 8; ++i) total[i] = stored(total[i]) + numbers[i];
}

extern "C" __global__ void combine(const row* buffer, const int* output_rows, const float* weights, const row* first,
                                   const row* second, row* out, int slots, int width) {
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * 8, lane = threadIdx.x % WARP_THREADS;
  const long long token = blockIdx.x;
  const bool is_whole = column < width && width % 8 == 0 && is_aligned(buffer);
  float total[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int slot = 0; slot < slots; slot += SLOTS_IN_FLIGHT) {
    // A warp lane reads one slot's row and weight for all.
    const long long own_slot = token * slots + min(slot + lane % SLOTS_IN_FLIGHT, slots - 1);
    const int own_row = output_rows[own_slot];
    const float own_weight = weights[own_slot];
    const row* from[SLOTS_IN_FLIGHT];
    Eight<row> held[SLOTS_IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < SLOTS_IN_FLIGHT; ++i) {
      from[i] = buffer + static_cast<long long>(__shfl_sync(FULL_WARP, own_row, i)) * width + column;
      if (is_whole && slot + i < slots) held[i] = read8(from[i]);
    }
#pragma unroll
    for (int i = 0; i < SLOTS_IN_FLIGHT; ++i) {
      const float weight = __shfl_sync(FULL_WARP, own_weight, i);
      if (is_whole && slot + i < slots) add_weighted(total, weight, held[i]);
      else if (column < width && slot + i < slots) add_weighted(total, weight, fetch8(from[i], width - column));
    }
  }
  if (column >= width) return;
  add_rounded(total, first, token * width + column, width - column);
  add_rounded(total, second, token * width + column, width - column);
  store8(out + token * width + column, width - column, total);
}
