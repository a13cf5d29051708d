// Norms of vectors of `width` numbers: rows (T, D), or heads of rows (T, H, D) with strides.
//
//   rms_norm     x / sqrt(mean(x^2) + eps), rounded or not, times weight                 NumPy: rms_norm
//   layer_norm   (x - mean(x)) / sqrt(variance(x) + eps) times weight plus bias          NumPy: layer_norm
//
// A block norms one vector and writes it contiguously; strides are in numbers.
// Launch: T * H blocks, threads as in packing.cu.
#include "rows.cuh"

extern "C" __global__ void rms_norm(const row* x, const row* weight, row* out, int heads, int width,
                                    long long token_stride, long long head_stride, float eps, int rounded) {
  const row* vector = x + vector_start(blockIdx.x, heads, token_stride, head_stride);
  float squares = 0.0f;
  for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
    float numbers[8];
    load8(vector + column, width - column, numbers);
    for (int i = 0; i < 8; ++i) squares += numbers[i] * numbers[i];
  }
  const float scale = sqrtf(block_sum(squares) / width + eps);
  for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
    float numbers[8], weights[8];
    load8(vector + column, width - column, numbers);
    load8(weight + column, width - column, weights);
    for (int i = 0; i < 8; ++i) {
      const float normalized = numbers[i] / scale;
      numbers[i] = (rounded ? stored(normalized) : normalized) * weights[i];
    }
    store8(out + static_cast<long long>(blockIdx.x) * width + column, width - column, numbers);
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
  const float mean = block_sum(sum) / width;
  for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
    float numbers[8];
    load8(vector + column, width - column, numbers);
    for (int i = 0; i < 8 && column + i < width; ++i) squares += (numbers[i] - mean) * (numbers[i] - mean);
  }
  const float scale = sqrtf(block_sum(squares) / width + eps);
  for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
    float numbers[8], weights[8], biases[8];
    load8(vector + column, width - column, numbers);
    load8(weight + column, width - column, weights);
    load8(bias + column, width - column, biases);
    for (int i = 0; i < 8; ++i) numbers[i] = (numbers[i] - mean) / scale * weights[i] + biases[i];
    store8(out + static_cast<long long>(blockIdx.x) * width + column, width - column, numbers);
  }
}
