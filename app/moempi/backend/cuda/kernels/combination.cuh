// Weighted sums of rows, plus addends: out[t] = sum over k, in order, of weights[t, k] * buffer[output_rows[t, k]]; then
// `first` and `second`, if they are not null, are added; each sum is rounded.
#pragma once
#include "rows.cuh"

const int SLOTS_IN_FLIGHT = 8;

// Shapes: first and second (n, width), output_rows and weights (n, slots).
struct Combination {
  const row* buffer;
  const int* output_rows;
  const float* weights;
  const row* first;
  const row* second;
  int slots;
  int width;
};

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

// Eight numbers of out[token] from `column` on, before the last rounding. All threads of a warp call it for one token; a
// column may be beyond the row.
__device__ inline void combine_eight(float* total, const Combination& given, long long token, int column) {
  const int lane = threadIdx.x % WARP_THREADS, left = given.width - column;
  const bool is_whole = left > 0 && given.width % 8 == 0 && is_aligned(given.buffer);
#pragma unroll
  for (int i = 0; i < 8; ++i) total[i] = 0.0f;
  for (int slot = 0; slot < given.slots; slot += SLOTS_IN_FLIGHT) {
    // A warp lane reads one slot's row and weight for all.
    const long long own_slot = token * given.slots + min(slot + lane % SLOTS_IN_FLIGHT, given.slots - 1);
    const int own_row = given.output_rows[own_slot];
    const float own_weight = given.weights[own_slot];
    const row* from[SLOTS_IN_FLIGHT];
    Eight<row> held[SLOTS_IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < SLOTS_IN_FLIGHT; ++i) {
      from[i] = given.buffer + static_cast<long long>(__shfl_sync(FULL_WARP, own_row, i)) * given.width + column;
      if (is_whole && slot + i < given.slots) held[i] = read8(from[i]);
    }
#pragma unroll
    for (int i = 0; i < SLOTS_IN_FLIGHT; ++i) {
      const float weight = __shfl_sync(FULL_WARP, own_weight, i);
      if (is_whole && slot + i < given.slots) add_weighted(total, weight, held[i]);
      else if (left > 0 && slot + i < given.slots) add_weighted(total, weight, fetch8(from[i], left));
    }
  }
  if (left <= 0) return;
  add_rounded(total, given.first, token * given.width + column, left);
  add_rounded(total, given.second, token * given.width + column, left);
}
