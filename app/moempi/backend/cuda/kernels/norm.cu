// Norms of vectors of `width` numbers: rows (T, D), or heads of rows (T, H, D) with strides.
//
//   rms_norm     x / sqrt(mean(x^2) + eps), rounded or not, times weight                 NumPy: rms_norm
//   add_rms_norm total = x + y (T, D), rounded, and rms_norm of total                    NumPy: add_rms_norm
//   combine_rms_norm  total = combine of packing.cu (T, D), and rms_norm of total           NumPy: combine_rms_norm
//   layer_norm   (x - mean(x)) / sqrt(variance(x) + eps) times weight plus bias          NumPy: layer_norm
//
// A block norms one vector and writes it contiguously; strides are in numbers.
// Launch: T * H blocks; layer_norm threads as in elementwise.cu; the others ceil(width / 32) threads, rounded up to
// whole warps, at most 512.
#include "combination.cuh"
#include "norm.cuh"

extern "C" __global__ void rms_norm(const row* x, const norm_weight* weight, row* out, int heads, int width,
                                    long long token_stride, long long head_stride, float eps, int rounded) {
  normalize_vector(x + vector_start(blockIdx.x, heads, token_stride, head_stride), weight,
                   out + static_cast<long long>(blockIdx.x) * width, width, eps, rounded);
}

extern "C" __global__ void add_rms_norm(const row* x, const row* y, const norm_weight* weight, row* total, row* out,
                                        int width, long long x_stride, long long y_stride, float eps, int rounded) {
  x += blockIdx.x * x_stride, y += blockIdx.x * y_stride;
  total += static_cast<long long>(blockIdx.x) * width, out += static_cast<long long>(blockIdx.x) * width;
  Eight<row> held_x[IN_FLIGHT], held_y[IN_FLIGHT];
  float squares = 0.0f;
  for (int first = threadIdx.x * 8; first < width; first += eights_step()) {
    fetch_eights<IN_FLIGHT>(held_x, x, first, width);
    fetch_eights<IN_FLIGHT>(held_y, y, first, width);
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      const int column = first + i * static_cast<int>(blockDim.x) * 8;
      float numbers[8], addends[8];
      unpack8(held_x[i], numbers), unpack8(held_y[i], addends);
#pragma unroll
      for (int n = 0; n < 8; ++n) numbers[n] = stored(numbers[n] + addends[n]);
      add_squares(&squares, numbers);
      if (column < width) store8(total + column, width - column, numbers);
    }
  }
  normalize(total, squares, weight, out, width, eps, rounded);
}

extern "C" __global__ void combine_rms_norm(const row* buffer, const int* output_rows, const float* weights,
                                            const row* first, const row* second, const norm_weight* weight, row* total,
                                            row* out, int slots, int width, float eps, int rounded) {
  const long long start = static_cast<long long>(blockIdx.x) * width;
  const int step = static_cast<int>(blockDim.x) * 8;
  float squares = 0.0f;
  for (int beyond = 0; beyond < width; beyond += step) {  // every thread, for the shuffles of its warp
    const int column = beyond + threadIdx.x * 8;
    float numbers[8];
    combine_eight(numbers, {buffer, output_rows, weights, first, second, slots, width}, blockIdx.x, column);
    if (column >= width) continue;
#pragma unroll
    for (int n = 0; n < 8; ++n) numbers[n] = n < width - column ? stored(numbers[n]) : 0.0f;
    add_squares(&squares, numbers);
    store8(total + start + column, width - column, numbers);
  }
  normalize(total + start, squares, weight, out + start, width, eps, rounded);
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
