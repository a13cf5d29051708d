// Products of few rows with a large matrix, whose speed is that of reading the matrix once.
//
//   multiply_few   partial[s] (T, N) = x (T, K) times matrix (N, K), over the inputs of split s
//   add_splits     out (T, N) = sum of the splits plus the bias (N), if there is one, rounded once     NumPy: linear
//   swiglu_splits  out (T, F) = swiglu of the sum of the splits (T, 2F) plus the bias, which is rounded before
//                                                                                     NumPy: linear, then swiglu
//
// Rows are bfloat16, partial sums float. T is at most ROWS, a compile-time constant: 16, 32 or 64. K is a multiple of
// 64, N of 16; memory is aligned to 16 bytes. The splits are added in order. A row's bits depend on the matrix's size
// and the split alone, not on the number of rows nor on ROWS.
//
// A block has 128 outputs, a warp 16 of them. The weights and x go through a ring of STAGES chunks of inputs in shared
// memory, which are copied in the background; the 16-byte pieces of a row are permuted as in warpgroup.cuh, so that the
// eight rows read together are in different banks.
// Launch: multiply_few (ceil(N / 128), splits) blocks of 256, with STAGES * (128 + ROWS) * 128 bytes of shared memory;
// the others (T, ceil(width / 1,024)) blocks of 128, eight numbers per thread.
#include "swiglu.cuh"
#include "tensor_core.cuh"

const int THREADS = 256, WARP_OUTPUTS = 16, BLOCK_OUTPUTS = THREADS / WARP_THREADS * WARP_OUTPUTS;
const int CHUNK = 64, PIECES = CHUNK / 8, ROW_STEP = THREADS / PIECES, TILES = ROWS / 8;
const int STAGES = ROWS == 16 ? 5 : 4, STAGE_NUMBERS = (BLOCK_OUTPUTS + ROWS) * CHUNK;
// Splits whose numbers are fetched together.
const int TOGETHER = 8;

// What a thread copies of each chunk: one piece of every ROW_STEP-th output and row.
struct Source {
  const row* weights[BLOCK_OUTPUTS / ROW_STEP];
  const row* x;
  long long x_step;
  int rows_left, place;
};

// Outputs beyond the last have the last one's weights, and are not written.
__device__ inline Source find_source(const row* x, const row* matrix, int num_rows, int outputs, int inputs,
                                     int begin) {
  const int own_row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
  Source source;
  for (int i = 0; i < BLOCK_OUTPUTS / ROW_STEP; ++i) {
    const int output = min(static_cast<int>(blockIdx.x) * BLOCK_OUTPUTS + own_row + i * ROW_STEP, outputs - 1);
    source.weights[i] = matrix + static_cast<long long>(output) * inputs + begin + piece * 8;
  }
  source.x = x + static_cast<long long>(own_row) * inputs + begin + piece * 8;
  source.x_step = static_cast<long long>(ROW_STEP) * inputs;
  source.rows_left = min(num_rows, ROWS) - own_row;
  source.place = own_row * CHUNK + (piece ^ own_row % PIECES) * 8;
  return source;
}

// Begin to copy the weights of the chunk that begins `ahead` inputs on.
__device__ inline void begin_weights(unsigned short* stage, const Source& source, int ahead) {
#pragma unroll
  for (int i = 0; i < BLOCK_OUTPUTS / ROW_STEP; ++i)
    begin_copy(stage + source.place + i * ROW_STEP * CHUNK, source.weights[i] + ahead);
}

// Begin to copy the chunk's part of x, which is behind the weights. Rows beyond the last are not copied.
__device__ inline void begin_x(unsigned short* stage, const Source& source, int ahead) {
#pragma unroll
  for (int step = 0; step < ROWS; step += ROW_STEP)
    if (step < source.rows_left)
      begin_copy(stage + source.place + (BLOCK_OUTPUTS + step) * CHUNK,
                 source.x + step / ROW_STEP * source.x_step + ahead);
}

// sums (16 x 8 TILES per warp) += the warp's weights times x, over one chunk.
__device__ inline void multiply_chunk(float (*sums)[4], const unsigned short* stage) {
  const int warp = threadIdx.x / WARP_THREADS, lane = threadIdx.x % WARP_THREADS, swap = lane % PIECES;
  const unsigned short* own_weights = stage + (warp * WARP_OUTPUTS + lane % 16) * CHUNK;
  const unsigned short* own_x = stage + (BLOCK_OUTPUTS + lane / 16 * 8 + lane % 8) * CHUNK;
#pragma unroll
  for (int piece = 0; piece < PIECES; piece += 2) {
    unsigned weights[4];
    load_matrices(weights, own_weights + (piece + lane / 16 ^ swap) * 8);
#pragma unroll
    for (int tile = 0; tile < TILES; tile += 2) {
      unsigned numbers[4];
      load_matrices(numbers, own_x + tile * 8 * CHUNK + (piece + lane / 8 % 2 ^ swap) * 8);
      multiply_add(sums[tile], weights, numbers);
      multiply_add(sums[tile + 1], weights, numbers + 2);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    multiply_few(const row* x, const row* matrix, float* partial, int num_rows, int outputs, int inputs,
                 int split_inputs) {
  DYNAMIC_SHARED(unsigned short, stages);
  const int begin = blockIdx.y * split_inputs, length = min(inputs - begin, split_inputs);
  const Source source = find_source(x, matrix, num_rows, outputs, inputs, begin);
  float sums[TILES][4] = {};
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (stage * CHUNK < length) {
      begin_weights(stages + stage * STAGE_NUMBERS, source, stage * CHUNK);
      begin_x(stages + stage * STAGE_NUMBERS, source, stage * CHUNK);
    }
    end_copies();
  }
  int reads = 0, fills = (STAGES - 1) * STAGE_NUMBERS;
#pragma unroll 1
  for (int at = 0; at < length; at += CHUNK) {
    await_groups_but<STAGES - 2>();
    __syncthreads();  // the chunk is there; all warps have read the one before, whose place the next takes
    const int ahead = at + (STAGES - 1) * CHUNK;
    if (ahead < length) begin_weights(stages + fills, source, ahead), begin_x(stages + fills, source, ahead);
    end_copies();
    multiply_chunk(sums, stages + reads);
    fills = reads;
    reads = reads == (STAGES - 1) * STAGE_NUMBERS ? 0 : reads + STAGE_NUMBERS;
  }
  const int warp = threadIdx.x / WARP_THREADS, lane = threadIdx.x % WARP_THREADS, g = lane / 4, t = lane % 4;
  const int first_output = blockIdx.x * BLOCK_OUTPUTS + warp * WARP_OUTPUTS;
  float* to = partial + static_cast<long long>(blockIdx.y) * num_rows * outputs;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = tile * 8 + 2 * t + i % 2, output = first_output + g + i / 2 * 8;
      if (token < num_rows && output < outputs) to[static_cast<long long>(token) * outputs + output] = sums[tile][i];
    }
}

// PARTS times eight numbers, `apart` numbers apart, of the sum of the splits plus the bias, rounded to the precision of
// rows. `from` are the numbers of the first split; up to TOGETHER splits are on their way at once.
template <int PARTS>
__device__ inline void sum_splits(float (*sums)[8], const float* from, const row* bias, int apart, int splits,
                                  long long split_size) {
  float biases[PARTS][8] = {};
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    if (bias) load8(bias + part * apart, 8, biases[part]);
    for (int i = 0; i < 8; ++i) sums[part][i] = 0.0f;
  }
#pragma unroll 1
  for (int first = 0; first < splits; first += TOGETHER) {
    Eight<float> held[TOGETHER][PARTS];
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
      for (int part = 0; part < PARTS; ++part)
        if (first + i < splits) held[i][part] = read8(from + (first + i) * split_size + part * apart);
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        float addends[8];
        unpack8(held[i][part], addends);
        for (int j = 0; j < 8; ++j)
          if (first + i < splits) sums[part][j] += addends[j];
      }
  }
#pragma unroll
  for (int part = 0; part < PARTS; ++part)
    for (int i = 0; i < 8; ++i) sums[part][i] = stored(sums[part][i] + biases[part][i]);
}

extern "C" __global__ void __launch_bounds__(128)
    add_splits(const float* partial, const row* bias, row* out, int splits, int width) {
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
  if (column >= width) return;
  const long long at = static_cast<long long>(blockIdx.x) * width + column;
  float sums[1][8];
  sum_splits<1>(sums, partial + at, bias ? bias + column : bias, 0, splits, static_cast<long long>(gridDim.x) * width);
  store8(out + at, 8, sums[0]);
}

extern "C" __global__ void __launch_bounds__(128)
    swiglu_splits(const float* partial, const row* bias, row* out, int splits, int hidden, float alpha, float limit) {
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
  if (column >= hidden) return;
  const long long split_size = static_cast<long long>(gridDim.x) * 2 * hidden;
  const float* from = partial + static_cast<long long>(blockIdx.x) * 2 * hidden + column;
  float both[2][8];  // gates, ups
  sum_splits<2>(both, from, bias ? bias + column : bias, hidden, splits, split_size);
  swiglu8(both[0], both[1], alpha, limit);
  store8(out + static_cast<long long>(blockIdx.x) * hidden + column, 8, both[0]);
}
