// The root-mean-square norm of one vector by all threads of a block: x / sqrt(mean(x^2) + eps), rounded or not, times
// weight.
#pragma once
#include "rows.cuh"

const int IN_FLIGHT = 4;

// Numbers of a vector that the block's threads fetch together.
__device__ inline int eights_step() { return IN_FLIGHT * static_cast<int>(blockDim.x) * 8; }

__device__ inline void add_squares(float* squares, const float* numbers) {
#pragma unroll
  for (int n = 0; n < 8; ++n) *squares += numbers[n] * numbers[n];
}

// Normalize a vector into `out` from each thread's sum of squares. A thread reads no other numbers of the vector than it
// has squared.
__device__ inline void normalize(const row* vector, float squares, const norm_weight* weight, row* out, int width,
                                 float eps, int rounded) {
  Eight<row> held[IN_FLIGHT];
  Eight<norm_weight> held_weights[IN_FLIGHT];
  const float factor = rsqrtf(__fdividef(block_sum(squares), width) + eps);
  for (int first = threadIdx.x * 8; first < width; first += eights_step()) {
    fetch_eights<IN_FLIGHT>(held, vector, first, width);
    fetch_eights<IN_FLIGHT>(held_weights, weight, first, width);
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      const int column = first + i * static_cast<int>(blockDim.x) * 8;
      float numbers[8], weights[8];
      unpack8(held[i], numbers), unpack8(held_weights[i], weights);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float normalized = numbers[n] * factor;
        numbers[n] = (rounded ? stored(normalized) : normalized) * weights[n];
      }
      if (column < width) store8(out + column, width - column, numbers);
    }
  }
}

// Normalize a vector of `width` numbers into `out`.
__device__ inline void normalize_vector(const row* vector, const norm_weight* weight, row* out, int width, float eps,
                                        int rounded) {
  Eight<row> held[IN_FLIGHT];
  float squares = 0.0f;
  for (int first = threadIdx.x * 8; first < width; first += eights_step()) {
    fetch_eights<IN_FLIGHT>(held, vector, first, width);
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      float numbers[8];
      unpack8(held[i], numbers);
      add_squares(&squares, numbers);
    }
  }
  normalize(vector, squares, weight, out, width, eps, rounded);
}
