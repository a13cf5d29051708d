// Elementwise functions of rows.
//
//   add               out = x + y                                                       NumPy: add
//   clip              out = min(max(x, -limit), limit), x (T, H, W) with strides        NumPy: clip
//   copy_columns      out[.., first:first + W] = x (T, H, W)                            NumPy: join_columns
//   round_biased      out = product (T, N) + bias (N), rounded once; the product is float  NumPy: linear
//   add_bias          product (T, N) += bias (N); the product is float                  NumPy: router_logits, logits
//   widen_rows        out = x (bfloat16 bits) as float                                  NumPy: moempi.arrays.widen
//   scale_by_sigmoid  out = x (T, D) times the sigmoid of logits (T, 1)                 NumPy: scale_by_sigmoid
//   scale_by_sigmoids  out = x times the sigmoids of as many logits                      NumPy: scale_by_sigmoid
//   squared_relu      out = max(0, x)^2                                                  NumPy: squared_relu
//   swiglu            out (T, F) = silu(gate) * up of (T, 2F), gate first; if alpha is not 0, the clamped form of
//                     config.architecture.Clamp                                         NumPy: swiglu
//
// Launch: functions of `count` numbers, ceil(count / 2048) blocks of 256, eight numbers per thread; the others, one
// block per row (T) or vector (T * H) of ceil(width / 8) threads, rounded up to whole warps, at most 1,024.
#include "swiglu.cuh"

__device__ inline long long first_of_thread() {
  return (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
}

extern "C" __global__ void add(const row* x, const row* y, row* out, long long count) {
  const long long at = first_of_thread();
  const Eight<row> held_x = fetch8(x + at, count - at), held_y = fetch8(y + at, count - at);
  float a[8], b[8];
  unpack8(held_x, a), unpack8(held_y, b);
  for (int i = 0; i < 8; ++i) a[i] += b[i];
  store8(out + at, count - at, a);
}

extern "C" __global__ void clip(const row* x, row* out, int heads, int width, long long token_stride,
                                long long head_stride, float limit) {
  const row* vector = x + vector_start(blockIdx.x, heads, token_stride, head_stride);
  for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
    float numbers[8];
    load8(vector + column, width - column, numbers);
    for (int i = 0; i < 8; ++i) numbers[i] = clamped(numbers[i], -limit, limit);
    store8(out + static_cast<long long>(blockIdx.x) * width + column, width - column, numbers);
  }
}

extern "C" __global__ void copy_columns(const row* x, row* out, int heads, int width, long long token_stride,
                                        long long head_stride, int first, int out_width) {
  const row* vector = x + vector_start(blockIdx.x, heads, token_stride, head_stride);
  row* to = out + static_cast<long long>(blockIdx.x) * out_width + first;
  for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8)
    copy8(vector + column, to + column, width - column);
}

extern "C" __global__ void round_biased(const float* product, const row* bias, row* out, int width) {
  const long long first = static_cast<long long>(blockIdx.x) * width;
  for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
    float sums[8], addends[8];
    load8(product + first + column, width - column, sums);
    load8(bias + column, width - column, addends);
    for (int i = 0; i < 8; ++i) sums[i] += addends[i];
    store8(out + first + column, width - column, sums);
  }
}

extern "C" __global__ void add_bias(float* product, const row* bias, int width) {
  for (int column = threadIdx.x; column < width; column += blockDim.x)
    product[static_cast<long long>(blockIdx.x) * width + column] += widen(bias[column]);
}

extern "C" __global__ void widen_rows(const unsigned short* x, float* out, long long count) {
  const long long at = first_of_thread();
  float numbers[8];
  load8(x + at, count - at, numbers);
  store8(out + at, count - at, numbers);
}

extern "C" __global__ void scale_by_sigmoid(const row* x, const row* logits, row* out, int width) {
  const long long start = static_cast<long long>(blockIdx.x) * width;
  const float sigmoid = 1.0f / (1.0f + expf(-widen(logits[blockIdx.x])));
  for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
    float numbers[8];
    load8(x + start + column, width - column, numbers);
    for (int i = 0; i < 8; ++i) numbers[i] *= sigmoid;
    store8(out + start + column, width - column, numbers);
  }
}

extern "C" __global__ void scale_by_sigmoids(const row* x, const row* logits, row* out, long long count) {
  const long long at = first_of_thread();
  const Eight<row> held_x = fetch8(x + at, count - at), held_logits = fetch8(logits + at, count - at);
  float numbers[8], exponents[8];
  unpack8(held_x, numbers), unpack8(held_logits, exponents);
  for (int i = 0; i < 8; ++i) numbers[i] /= 1.0f + expf(-exponents[i]);
  store8(out + at, count - at, numbers);
}

extern "C" __global__ void squared_relu(const row* x, row* out, long long count) {
  const long long at = first_of_thread();
  float numbers[8];
  load8(x + at, count - at, numbers);
  for (int i = 0; i < 8; ++i) numbers[i] = numbers[i] < 0.0f ? 0.0f : numbers[i] * numbers[i];
  store8(out + at, count - at, numbers);
}

extern "C" __global__ void swiglu(const row* gate_up, row* out, int hidden, float alpha, float limit) {
  const row* both = gate_up + static_cast<long long>(blockIdx.x) * 2 * hidden;
  for (int column = threadIdx.x * 8; column < hidden; column += blockDim.x * 8) {
    const Eight<row> held_gates = fetch8(both + column, hidden - column);
    const Eight<row> held_ups = fetch8(both + hidden + column, hidden - column);
    float gates[8], ups[8];
    unpack8(held_gates, gates), unpack8(held_ups, ups);
    for (int i = 0; i < 8; ++i) gates[i] = swiglu_of(gates[i], ups[i], alpha, limit);
    store8(out + static_cast<long long>(blockIdx.x) * hidden + column, hidden - column, gates);
  }
}
