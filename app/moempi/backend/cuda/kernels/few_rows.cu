// Products of few rows with a large matrix, whose speed is that of reading the matrix once.
//
//   multiply_few   partial[s] (T, N) = x (T, K) times matrix (N, K), over the inputs of split s
//   add_splits     out (T, N) = sum of the splits plus the bias (N), if there is one, rounded once     NumPy: linear
//   swiglu_splits  out (T, F) = swiglu of the sum of the splits (T, 2F) plus the bias, which is rounded before
//                                                                                     NumPy: linear, then swiglu
//
// Rows are bfloat16, partial sums float. T is at most ROWS, a compile-time constant: 16 or 64. K is a multiple of 32, N
// of 8; memory is aligned to 16 bytes. The splits are added in order. A row's bits depend on the matrix's
// size and the split alone, not on the number of rows.
//
// A warp has 16 outputs and reads their weights straight into the registers of the matrix instruction, 16 bytes a lane.
// The inputs of an instruction are thereby in another order, the same for x. Weights are fetched one chunk of inputs
// ahead; the block's part of x is copied to shared memory chunk by chunk.
// Launch: multiply_few (ceil(N / 128), splits) blocks of 256; the others one block per row of ceil(width / 8) threads,
// rounded up to whole warps, at most 1,024.
#include "swiglu.cuh"
#include "tensor_core.cuh"

const int THREADS = 256, WARP_OUTPUTS = 16, BLOCK_OUTPUTS = THREADS / WARP_THREADS * WARP_OUTPUTS;
const int CHUNK = 128, GROUP = 32, GROUPS = CHUNK / GROUP, TILES = ROWS / 8, ROW_STEP = THREADS / (CHUNK / 8);
// Rows of shared memory are padded, so that two rows read together are in different banks.
const int STAGED_WIDTH = CHUNK + 32;

// The weights of one group of inputs for two outputs, which are `apart` numbers apart; from input `last` on they are zero.
__device__ inline void fetch_weights(uint4* weights, const row* from, int apart, int input, int last) {
  weights[0] = input < last ? *reinterpret_cast<const uint4*>(from + input) : uint4{0, 0, 0, 0};
  weights[1] = input < last ? *reinterpret_cast<const uint4*>(from + input + apart) : uint4{0, 0, 0, 0};
}

// Begin to copy a chunk of x (num_rows, inputs), of which a thread has the same eight inputs of every ROW_STEP-th row. Rows beyond the last
// are not copied, nor are inputs from `last` on.
__device__ inline void begin_chunk(unsigned short* to, const row* x, int num_rows, int inputs, int first, int last) {
  const int own_row = threadIdx.x / (CHUNK / 8), column = threadIdx.x % (CHUNK / 8) * 8;
  const row* from = x + static_cast<long long>(own_row) * inputs + first + column;
#pragma unroll
  for (int step = 0; step < ROWS; step += ROW_STEP, from += ROW_STEP * inputs)
    if (own_row + step < num_rows && first + column < last)
      begin_copy(to + (own_row + step) * STAGED_WIDTH + column, from);
  end_copies();
}

// sums (16 x 8 TILES per warp) += a group's weights times its part of x.
__device__ inline void multiply_group(float (*sums)[4], const uint4* weights, const unsigned short* staged) {
  const int lane = threadIdx.x % WARP_THREADS, g = lane / 4, t = lane % 4;
  const uint4 low = weights[0], high = weights[1];
  const unsigned first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    const uint4 inputs = *reinterpret_cast<const uint4*>(staged + (tile * 8 + g) * STAGED_WIDTH + t * 8);
    const unsigned pairs[4] = {inputs.x, inputs.y, inputs.z, inputs.w};
    multiply_add(sums[tile], first, pairs);
    multiply_add(sums[tile], second, pairs + 2);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    multiply_few(const row* x, const row* matrix, float* partial, int num_rows, int outputs, int inputs,
                 int split_inputs) {
  __shared__ __align__(16) unsigned short staged[2][ROWS * STAGED_WIDTH];
  const int warp = threadIdx.x / WARP_THREADS, lane = threadIdx.x % WARP_THREADS, g = lane / 4, t = lane % 4;
  const int first_output = blockIdx.x * BLOCK_OUTPUTS + warp * WARP_OUTPUTS;
  const int begin = blockIdx.y * split_inputs, end = min(inputs, begin + split_inputs);
  // Outputs beyond the last read the last one's weights, and are not written.
  const int own_output = min(first_output + g, outputs - 1), apart = (min(own_output + 8, outputs - 1) - own_output) * inputs;
  const row* from = matrix + static_cast<long long>(own_output) * inputs + t * 8;
  uint4 weights[GROUPS][2];
  float sums[TILES][4] = {};
  begin_chunk(staged[0], x, num_rows, inputs, begin, end);
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) fetch_weights(weights[group], from, apart, begin + group * GROUP, end);
#pragma unroll 1
  for (int first = begin, stage = 0; first < end; first += CHUNK, stage ^= 1) {
    await_copies();
    __syncthreads();  // the chunk is there; all warps have read the one before, whose place the next takes
    begin_chunk(staged[stage ^ 1], x, num_rows, inputs, first + CHUNK, end);
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      multiply_group(sums, weights[group], staged[stage] + group * GROUP);
      fetch_weights(weights[group], from, apart, first + CHUNK + group * GROUP, end);
    }
  }
  float* to = partial + static_cast<long long>(blockIdx.y) * num_rows * outputs;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = tile * 8 + 2 * t + i % 2, output = first_output + g + i / 2 * 8;
      if (token < num_rows && output < outputs) to[static_cast<long long>(token) * outputs + output] = sums[tile][i];
    }
}

// Eight numbers of the sum of the splits plus the bias, rounded to the precision of rows.
__device__ inline void sum_splits(float* sums, const float* partial, const row* bias, int splits, long long split_size,
                                  int width, int column) {
  const float* from = partial + static_cast<long long>(blockIdx.x) * width + column;
  load8(from, width - column, sums);
  for (int split = 1; split < splits; ++split) {
    float addends[8];
    load8(from + split * split_size, width - column, addends);
    for (int i = 0; i < 8; ++i) sums[i] += addends[i];
  }
  if (bias) {
    float addends[8];
    load8(bias + column, width - column, addends);
    for (int i = 0; i < 8; ++i) sums[i] += addends[i];
  }
  for (int i = 0; i < 8; ++i) sums[i] = stored(sums[i]);
}

extern "C" __global__ void add_splits(const float* partial, const row* bias, row* out, int splits, int width) {
  const long long split_size = static_cast<long long>(gridDim.x) * width;
  for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
    float sums[8];
    sum_splits(sums, partial, bias, splits, split_size, width, column);
    store8(out + static_cast<long long>(blockIdx.x) * width + column, width - column, sums);
  }
}

extern "C" __global__ void swiglu_splits(const float* partial, const row* bias, row* out, int splits, int hidden,
                                         float alpha, float limit) {
  const long long split_size = static_cast<long long>(gridDim.x) * 2 * hidden;
  for (int column = threadIdx.x * 8; column < hidden; column += blockDim.x * 8) {
    float gates[8], ups[8];
    sum_splits(gates, partial, bias, splits, split_size, 2 * hidden, column);
    sum_splits(ups, partial, bias, splits, split_size, 2 * hidden, hidden + column);
    swiglu8(gates, ups, alpha, limit);
    store8(out + static_cast<long long>(blockIdx.x) * hidden + column, hidden - column, gates);
  }
}
