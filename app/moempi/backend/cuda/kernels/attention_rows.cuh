// Shared by the kernels that attend tiles of queries on tensor cores: the queries of a warp, and sums over its scores.
#pragma once
#include "paging.cuh"
#include "tensor_core.cuh"

const int WARP_ROWS = 16;
const float LOG2_E = 1.44269504f;

// A row of the scores is spread over a group of four warp lanes.
__device__ inline float group_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, 1));
  return fmaxf(value, __shfl_xor_sync(FULL_WARP, value, 2));
}
__device__ inline float group_sum(float value) {
  value += __shfl_xor_sync(FULL_WARP, value, 1);
  return value + __shfl_xor_sync(FULL_WARP, value, 2);
}

// The queries of a warp as fragments; rows beyond the end of the tile are zero.
__device__ inline void load_queries(unsigned (*fragments)[4], const row* queries, int first, int count, int heads) {
  const int lane = threadIdx.x % WARP_THREADS, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step)
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int query = first + g + part % 2 * 8, column = step * 16 + part / 2 * 8 + 2 * t;
      const row* from = queries + static_cast<long long>(query) * heads * HEAD_DIM + column;
      fragments[step][part] = query < count ? *reinterpret_cast<const unsigned*>(from) : 0u;
    }
}
