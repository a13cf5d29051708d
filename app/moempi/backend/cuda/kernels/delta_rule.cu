// The gated delta rule (Yang et al. 2025) and state spaces (Mamba-2): a state per sequence in place of cached keys.
//
//   causal_conv  out (T, C) = silu of the sum of the last rows of x (T, C) times taps (n, C), and of a bias (C) if it is
//                not null; the tail of each sequence's
//                state (n - 1, C) is what the rows before the segment were, and is brought up to date
//                                                                                          NumPy: causal_conv
//   delta_rule   out (T, H, dim) = what queries read from the state (key dim, dim) of each head, which keys and values
//                (T, H, dim) change before; rates (T, 2 H) are the logits of beta, then of the decay  NumPy: delta_rule
//   state_space  out (T, H, dim) = what the states' outputs read from the state (state dim, dim) of each head, which
//                their inputs and values (T, H, dim) change before; steps (T, H)           NumPy: state_space
//   gated_norm   out = x / sqrt(mean(x^2) + eps) times weight times silu(gate), vectors of `width` numbers
//                                                                                          NumPy: gated_norm
//
// segments (S, 4): first row, number of rows, position of the first row, index of the state. A sequence that starts at
// position 0 begins with zeros. Positions are computed one after another, so that bits do not depend on the steps.
// Launch: causal_conv (S, ceil(C / 128)) blocks of 128; delta_rule and state_space (S, H, ceil(dim / 128)) blocks of 128,
// one column of the state per thread; gated_norm as in elementwise.cu.
#include "rows.cuh"

const int MOST_KEYS = 1024;  // the largest key_dim and state_dim of config.architecture
const float LEAST_LENGTH = 1e-6f;

__device__ inline float silu(float number) { return number / (1.0f + expf(-number)); }

extern "C" __global__ void causal_conv(const row* x, const row* taps, const row* bias, const int* segments,
                                       float* tail, row* out, int channels, int num_taps, long long stride) {
  const int channel = blockIdx.y * blockDim.x + threadIdx.x, back = num_taps - 1;
  if (channel >= channels) return;
  const int* segment = segments + 4 * blockIdx.x;
  const int length = segment[1], start = segment[2];
  x += segment[0] * stride + channel, taps += channel;
  out += static_cast<long long>(segment[0]) * channels + channel;
  tail += static_cast<long long>(segment[3]) * back * channels + channel;
  for (int position = 0; position < length; ++position) {
    float sum = bias ? widen(bias[channel]) : 0.0f;
    for (int tap = 0; tap < num_taps; ++tap) {
      const int at = position - back + tap;
      float number = 0.0f;
      if (at >= 0) number = widen(x[at * stride]);
      else if (start) number = tail[static_cast<long long>(back + at) * channels];
      sum += number * widen(taps[static_cast<long long>(tap) * channels]);
    }
    narrow(silu(sum), out + static_cast<long long>(position) * channels);
  }
  for (int held = 0; held < back; ++held) {  // a row that stays comes from a later place of the tail
    const int at = length - back + held;
    float number = 0.0f;
    if (at >= 0) number = widen(x[at * stride]);
    else if (start) number = tail[static_cast<long long>(back + at) * channels];
    tail[static_cast<long long>(held) * channels] = number;
  }
}

// Put a query or key of `dim` numbers, divided by its length, into shared memory; all threads of the block must call it.
__device__ inline void load_unit(const row* from, float* unit, int dim) {
  float squares = 0.0f;
  for (int i = threadIdx.x; i < dim; i += blockDim.x) {
    unit[i] = widen(from[i]);
    squares += unit[i] * unit[i];
  }
  const float length = sqrtf(block_sum(squares) + LEAST_LENGTH);
  for (int i = threadIdx.x; i < dim; i += blockDim.x) unit[i] /= length;
}

extern "C" __global__ void delta_rule(const row* queries, const row* keys, const row* values, const row* rates,
                                      const float* decay_log, const float* decay_bias, const int* segments,
                                      float* memory, row* out, int key_heads, int value_heads, int key_dim,
                                      int value_dim, long long query_stride, long long key_stride,
                                      long long value_stride) {
  __shared__ float query[MOST_KEYS], key[MOST_KEYS];
  const int head = blockIdx.y, column = blockIdx.z * blockDim.x + threadIdx.x;
  const int* segment = segments + 4 * blockIdx.x;
  const long long key_head = head / (value_heads / key_heads) * static_cast<long long>(key_dim);
  const bool has_column = column < value_dim;
  float* state = memory + (static_cast<long long>(segment[3]) * value_heads + head) * key_dim * value_dim + column;
  if (segment[2] == 0 && has_column)
    for (int i = 0; i < key_dim; ++i) state[static_cast<long long>(i) * value_dim] = 0.0f;
  const float speed = expf(decay_log[head]), bias = decay_bias[head], scale = 1.0f / sqrtf(key_dim);
  for (long long token = segment[0]; token < segment[0] + segment[1]; ++token) {
    load_unit(queries + token * query_stride + key_head, query, key_dim);
    load_unit(keys + token * key_stride + key_head, key, key_dim);
    __syncthreads();
    if (has_column) {
      const float beta = 1.0f / (1.0f + expf(-widen(rates[token * 2 * value_heads + head])));
      const float rate = widen(rates[(token * 2 + 1) * value_heads + head]) + bias;
      const float alpha = expf(-speed * (fmaxf(rate, 0.0f) + log1pf(expf(-fabsf(rate)))));
      float seen = 0.0f, read = 0.0f;
      for (int i = 0; i < key_dim; ++i) seen += alpha * state[static_cast<long long>(i) * value_dim] * key[i];
      const float change = beta * (widen(values[token * value_stride + head * value_dim + column]) - seen);
      for (int i = 0; i < key_dim; ++i) {
        float* number = state + static_cast<long long>(i) * value_dim;
        *number = alpha * *number + key[i] * change;
        read += *number * query[i] * scale;
      }
      narrow(read, out + (token * value_heads + head) * value_dim + column);
    }
    __syncthreads();
  }
}

extern "C" __global__ void state_space(const row* outputs, const row* inputs, const row* values, const row* steps,
                                       const float* decay_log, const float* step_bias, const float* skip,
                                       const int* segments, float* memory, row* out, int groups, int heads,
                                       int state_dim, int head_dim, long long output_stride, long long input_stride,
                                       long long value_stride, float least_step) {
  __shared__ float output[MOST_KEYS], input[MOST_KEYS];
  const int head = blockIdx.y, column = blockIdx.z * blockDim.x + threadIdx.x;
  const int* segment = segments + 4 * blockIdx.x;
  const long long group = head / (heads / groups) * static_cast<long long>(state_dim);
  const bool has_column = column < head_dim;
  float* state = memory + (static_cast<long long>(segment[3]) * heads + head) * state_dim * head_dim + column;
  if (segment[2] == 0 && has_column)
    for (int i = 0; i < state_dim; ++i) state[static_cast<long long>(i) * head_dim] = 0.0f;
  const float speed = expf(decay_log[head]), bias = step_bias[head];
  for (long long token = segment[0]; token < segment[0] + segment[1]; ++token) {
    for (int i = threadIdx.x; i < state_dim; i += blockDim.x) {
      output[i] = widen(outputs[token * output_stride + group + i]);
      input[i] = widen(inputs[token * input_stride + group + i]);
    }
    __syncthreads();
    if (has_column) {
      const float rate = widen(steps[token * heads + head]) + bias;
      const float step = fmaxf(fmaxf(rate, 0.0f) + log1pf(expf(-fabsf(rate))), least_step);
      const float alpha = expf(-speed * step), value = widen(values[token * value_stride + head * head_dim + column]);
      float read = skip[head] * value;
      for (int i = 0; i < state_dim; ++i) {
        float* number = state + static_cast<long long>(i) * head_dim;
        *number = alpha * *number + input[i] * (step * value);
        read += *number * output[i];
      }
      narrow(read, out + (token * heads + head) * head_dim + column);
    }
    __syncthreads();
  }
}

extern "C" __global__ void gated_norm(const row* x, const row* gate, const float* weight, row* out, int width,
                                      float eps) {
  const long long first = static_cast<long long>(blockIdx.x) * width;
  float squares = 0.0f;
  for (int column = threadIdx.x; column < width; column += blockDim.x) {
    const float number = widen(x[first + column]);
    squares += number * number;
  }
  const float length = sqrtf(block_sum(squares) / width + eps);
  for (int column = threadIdx.x; column < width; column += blockDim.x) {
    const float normalized = widen(x[first + column]) / length * weight[column];
    narrow(normalized * silu(widen(gate[first + column])), out + first + column);
  }
}
