// Norms of vectors of `width` numbers: rows (T, D), or heads of rows (T, H, D) with strides.
//
//   rms_norm     x / sqrt(mean(x^2) + eps), rounded or not, times weight                 NumPy: rms_norm
//   layer_norm   (x - mean(x)) / sqrt(variance(x) + eps) times weight plus bias          NumPy: layer_norm
//
// A block norms one vector and writes it contiguously; strides are in numbers.
// Launch: T * H blocks; layer_norm threads as in elementwise.cu; rms_norm ceil(width / 32) threads, rounded up to whole
// warps, at most 512.
#include "rows.cuh"

const int IN_FLIGHT = 4;

extern "C" __global__ void rms_norm(const row* x, const row* weight, row* out, int heads, int width,
                                    long long token_stride, long long head_stride, float eps, int rounded) {
  const row* vector = x + vector_start(blockIdx.x, heads, token_stride, head_stride);
  const int step = IN_FLIGHT * static_cast<int>(blockDim.x) * 8;
  Eight<row> held[IN_FLIGHT], held_weights[IN_FLIGHT];
  float squares = 0.0f;
  for (int first = threadIdx.x * 8; first < width; first += step) {
    fetch_eights<IN_FLIGHT>(held, vector, first, width);
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      float numbers[8];
      unpack8(held[i], numbers);
#pragma unroll
      for (int n = 0; n < 8; ++n) squares += numbers[n] * numbers[n];
    }
  }
  const float factor = rsqrtf(__fdividef(block_sum(squares), width) + eps);
  for (int first = threadIdx.x * 8; first < width; first += step) {
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
      if (column < width) store8(out + static_cast<long long>(blockIdx.x) * width + column, width - column, numbers);
    }
  }
}

extern "C" __global__ void layer_norm(const row* x, const row* weight, const row* bias, row* out, int heads, int width,
                                      long long token_stride, long long head_stride, float eps) {
  const row* vector = x + vector_start(blockIdx.x, heads, token_stride, head_stride);
  float sum = 0.0f, squares = 0.0f;
  for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
    float numbers[8];
    load8(vector + column, width - column, numbers);
    for (int i = 0; i < 8; ++i) sum += numbers[i];
  }
  const float mean = __fdividef(block_sum(sum), width);
  for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
    float numbers[8];
    load8(vector + column, width - column, numbers);
    for (int i = 0; i < 8 && column + i < width; ++i) squares += (numbers[i] - mean) * (numbers[i] - mean);
  }
  const float factor = rsqrtf(__fdividef(block_sum(squares), width) + eps);
  for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
    float numbers[8], weights[8], biases[8];
    load8(vector + column, width - column, numbers);
    load8(weight + column, width - column, weights);
    load8(bias + column, width - column, biases);
    for (int i = 0; i < 8; ++i) numbers[i] = (numbers[i] - mean) * factor * weights[i] + biases[i];
    store8(out + static_cast<long long>(blockIdx.x) * width + column, width - column, numbers);
  }
}
