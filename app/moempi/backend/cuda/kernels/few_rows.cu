// Products of few rows with the matrices of several experts, as fast as the weights are read once.
//
//   multiply_few  out (T, N) = x (T, K) times matrix (N, K) plus the bias (N)               NumPy: linear
//   gate_up_few   out (T, F) = swiglu of x (T, K) times matrix (2F, K) plus the bias (2F)   NumPy: linear, then swiglu
//
// Rows are bfloat16, sums float. Expert e of a launch has counts[e] rows, at most ROWS, a compile-time constant: 16, 32
// or 64. K is a multiple of 64; memory is aligned to 16 bytes.
//
// A block has a tile of 128 rows of each expert's matrix (outputs), a warp 16 of them, and a split of the inputs. In
// gate_up_few a warp has 8 gates and their 8 ups, so that each thread holds both. Weights and x go through a ring of
// STAGES chunks of inputs in shared memory, which are copied in the background, the next expert's behind the last one's.
// Each warp writes its sums; the one that comes last for its outputs adds the splits in their order. So a row's bits
// depend on the matrix and the splits alone, not on T, ROWS or the other experts.
//
// A block begins to read weights before the kernels ahead of it in the queue are done (await_predecessors).
// Launch, early: (tiles, splits) blocks of 256, with STAGES * STAGE_NUMBERS * 2 bytes of shared memory. `partial` has
// experts * tiles * splits * THREADS * ROWS / 8 float4; `arrived`, an int for each warp of each tile of each expert, is
// zero between launches.
#include "early_launch.cuh"
#include "swiglu.cuh"
#include "warpgroup.cuh"

const int MOST_EXPERTS = 32;  // equals MOST_EXPERTS of cuda/device.py
struct Experts {
  const row* matrices[MOST_EXPERTS];
  const row* biases[MOST_EXPERTS];
  int x_starts[MOST_EXPERTS], out_starts[MOST_EXPERTS], counts[MOST_EXPERTS];
};

const int THREADS = 256, BLOCK_OUTPUTS = THREADS / WARP_THREADS * 16, GROUP_OUTPUTS = 64;
const int CHUNK = 128, PIECES = CHUNK / 8, ROW_STEP = THREADS / PIECES, TILES = ROWS / 8;
const int STAGES = ROWS == 64 ? 3 : 4, STAGE_NUMBERS = (BLOCK_OUTPUTS + ROWS) * CHUNK;

// Splits whose sums are fetched together.
const int TOGETHER = 16 / TILES;

// The sizes of a product, and a block's part of its inputs.
struct Part {
  int outputs, inputs, begin, length;
};

// The row of the matrix that a block has as its row `own`; of gate_up_few, warp w has gates 8w to 8w + 7 and their ups.
// Outputs beyond the last have the last one's weights, and are not written.
template <bool IS_GATED>
__device__ inline int matrix_row(int own, int outputs) {
  if (!IS_GATED) return min(static_cast<int>(blockIdx.x) * BLOCK_OUTPUTS + own, outputs - 1);
  const int gate = min(static_cast<int>(blockIdx.x) * (BLOCK_OUTPUTS / 2) + own / 16 * 8 + own % 8, outputs - 1);
  return own % 16 < 8 ? gate : outputs + gate;
}

// The chunks of all experts in the order in which they go through the ring. A thread copies one piece of every
// ROW_STEP-th output and of every ROW_STEP-th row of x.
template <bool IS_GATED>
struct Feed {
  const row* weights[BLOCK_OUTPUTS / ROW_STEP];
  const row* x;
  int expert = 0, at = 0, rows_left = 0, pieces_left = 0;

  __device__ inline void begin_expert(const Experts& experts, const row* all_x, const Part& part) {
    const int own_row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
#pragma unroll
    for (int i = 0; i < BLOCK_OUTPUTS / ROW_STEP; ++i)
      weights[i] = experts.matrices[expert] + part.begin + piece * 8 +
                   static_cast<long long>(matrix_row<IS_GATED>(own_row + i * ROW_STEP, part.outputs)) * part.inputs;
    x = all_x + static_cast<long long>(experts.x_starts[expert] + own_row) * part.inputs + part.begin + piece * 8;
    rows_left = experts.counts[expert] - own_row;
    pieces_left = part.length / 8 - piece;
    at = 0;
  }

  // Go on to the next chunk; its expert may be `num_experts`, when there is none.
  __device__ inline void advance(const Experts& experts, const row* all_x, const Part& part, int num_experts) {
    at += CHUNK, pieces_left -= PIECES;
    if (at >= part.length && ++expert < num_experts) begin_expert(experts, all_x, part);
  }

  __device__ inline void begin_weights(unsigned short* stage) const {
    if (pieces_left <= 0) return;
    const int own_row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
#pragma unroll
    for (int i = 0; i < BLOCK_OUTPUTS / ROW_STEP; ++i)
      begin_copy_once(stage + panel_offset(own_row + i * ROW_STEP, piece, BLOCK_OUTPUTS), weights[i] + at);
  }

  // Rows of x beyond the last are not copied.
  __device__ inline void begin_x(unsigned short* stage, int inputs) const {
    if (pieces_left <= 0) return;
    const int own_row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
#pragma unroll
    for (int step = 0; step < ROWS; step += ROW_STEP)
      if (step < rows_left)
        begin_copy(stage + BLOCK_OUTPUTS * CHUNK + panel_offset(own_row + step, piece, ROWS),
                   x + static_cast<long long>(step) * inputs + at);
  }

  // Copy x at once.
  __device__ inline void copy_x(unsigned short* stage, int inputs) const {
    if (pieces_left <= 0) return;
    const int own_row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    uint4 held[ROWS / ROW_STEP];
#pragma unroll
    for (int step = 0; step < ROWS; step += ROW_STEP)
      if (step < rows_left)
        held[step / ROW_STEP] =
            __ldcg(reinterpret_cast<const uint4*>(x + static_cast<long long>(step) * inputs + at));
#pragma unroll
    for (int step = 0; step < ROWS; step += ROW_STEP)
      if (step < rows_left)
        *reinterpret_cast<uint4*>(stage + BLOCK_OUTPUTS * CHUNK + panel_offset(own_row + step, piece, ROWS)) =
            held[step / ROW_STEP];
  }
};

// sums += weights times x over `left` inputs of a chunk, in the background: 64 outputs (rows) of the warpgroup and ROWS
// tokens.
__device__ inline void begin_chunk(float (*sums)[4], const unsigned short* stage, int left) {
  const int group = threadIdx.x / (4 * WARP_THREADS);
  const unsigned weights = shared_address(stage + group * GROUP_OUTPUTS * PANEL_WIDTH);
  const unsigned x = shared_address(stage + BLOCK_OUTPUTS * CHUNK);
  begin_products();
#pragma unroll
  for (int k = 0; k < CHUNK; k += 16) {
    const int panel = k / PANEL_WIDTH, bytes = k % PANEL_WIDTH * 2;
    if (panel * PANEL_WIDTH < left)
      multiply_shared(sums, describe_panels(weights + panel * BLOCK_OUTPUTS * PANEL_ROW_BYTES + bytes, 0),
                    describe_panels(x + panel * ROWS * PANEL_ROW_BYTES + bytes, 0), Width<ROWS>());
  }
  end_products();
}

// Write the warp's sums; in the warp that comes last for its outputs, replace them by the sum of all splits.
__device__ inline bool add_splits(float (*sums)[4], float4* partial, int* arrived, int expert, int num_rows) {
  const int splits = gridDim.y, warp = threadIdx.x / WARP_THREADS, tile_number = expert * gridDim.x + blockIdx.x;
  float4* of_thread = partial + static_cast<long long>(tile_number) * splits * TILES * THREADS + threadIdx.x;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
    if (tile * 8 < num_rows)
      of_thread[(blockIdx.y * TILES + tile) * THREADS] =
          make_float4(sums[tile][0], sums[tile][1], sums[tile][2], sums[tile][3]);
  __syncwarp();
  int before = 0;
  if (threadIdx.x % WARP_THREADS == 0) {
    int* count = arrived + tile_number * (THREADS / WARP_THREADS) + warp;
    __threadfence();  // the warp's sums before its arrival
    before = atomicAdd(count, 1);
    __threadfence();  // the others' arrivals before their sums
    if (before == splits - 1) *count = 0;
  }
  if (__shfl_sync(FULL_WARP, before, 0) != splits - 1) return false;
  __syncwarp();  // lane 0's fence before the others' reads
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
    for (int i = 0; i < 4; ++i) sums[tile][i] = 0.0f;
#pragma unroll 1
  for (int first = 0; first < splits; first += TOGETHER) {
    float4 held[TOGETHER][TILES];
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
        if (first + i < splits && tile * 8 < num_rows)
          held[i][tile] = __ldcg(of_thread + ((first + i) * TILES + tile) * THREADS);
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
        if (first + i < splits && tile * 8 < num_rows) {
          const float4 addend = held[i][tile];
          sums[tile][0] += addend.x, sums[tile][1] += addend.y, sums[tile][2] += addend.z, sums[tile][3] += addend.w;
        }
  }
  return true;
}

// Write the sums and their biases to an expert's rows. A thread has outputs `first` and `second` of tokens 2t and
// 2t + 1 of each eight: a gate and its up in gate_up_few.
template <bool IS_GATED>
__device__ inline void write_rows(const float (*sums)[4], const row* bias, row* out, int num_rows, int outputs,
                                  float alpha, float limit) {
  const int warp = threadIdx.x / WARP_THREADS, lane = threadIdx.x % WARP_THREADS, g = lane / 4, t = lane % 4;
  const int first = (blockIdx.x * (THREADS / WARP_THREADS) + warp) * (IS_GATED ? 8 : 16) + g;
  const int second = IS_GATED ? outputs + first : first + 8;
  const bool has_first = first < outputs, has_second = IS_GATED ? has_first : second < outputs;
  const float first_bias = bias && has_first ? widen(bias[first]) : 0.0f;
  const float second_bias = bias && has_second ? widen(bias[second]) : 0.0f;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = tile * 8 + 2 * t + i;
      if (token >= num_rows) continue;
      const float sum = sums[tile][i] + first_bias, other = sums[tile][2 + i] + second_bias;
      row* to = out + static_cast<long long>(token) * outputs;
      if (IS_GATED) {
        if (has_first) narrow(swiglu_of(stored(sum), stored(other), alpha, limit), to + first);
      } else {
        if (has_first) narrow(sum, to + first);
        if (has_second) narrow(other, to + second);
      }
    }
}

template <bool IS_GATED>
__device__ inline void multiply(const row* x, row* out, float4* partial, int* arrived, const Experts& experts,
                                int num_experts, const Part& part, float alpha, float limit) {
  DYNAMIC_SHARED(unsigned short, stages);
  start_successor();
  Feed<IS_GATED> feed;
  feed.begin_expert(experts, x, part);
#pragma unroll 1
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (feed.expert < num_experts) {
      feed.begin_weights(stages + stage * STAGE_NUMBERS);
      feed.advance(experts, x, part, num_experts);
    }
    end_copies();
  }
  await_predecessors();
  // The first x does not come in the background: that copy would be waited for with all weights begun before it.
  Feed<IS_GATED> x_feed;
  x_feed.begin_expert(experts, x, part);
#pragma unroll 1
  for (int stage = 0; stage < STAGES - 1 && x_feed.expert < num_experts; ++stage) {
    x_feed.copy_x(stages + stage * STAGE_NUMBERS, part.inputs);
    x_feed.advance(experts, x, part, num_experts);
  }
  int reads = 0, fills = (STAGES - 1) * STAGE_NUMBERS;
#pragma unroll 1
  for (int expert = 0; expert < num_experts; ++expert) {
    float sums[TILES][4] = {};
#pragma unroll 1
    for (int at = 0; at < part.length; at += CHUNK) {
      await_groups_but<STAGES - 2>();
      publish_copies();
      await_products_but<0>();
      __syncthreads();  // the chunk is there; all have multiplied the one before, whose place the next takes
      if (feed.expert < num_experts) {
        feed.begin_weights(stages + fills);
        feed.begin_x(stages + fills, part.inputs);
        feed.advance(experts, x, part, num_experts);
      }
      end_copies();
      begin_chunk(sums, stages + reads, part.length - at);
      fills = reads;
      reads = reads == (STAGES - 1) * STAGE_NUMBERS ? 0 : reads + STAGE_NUMBERS;
    }
    await_products_but<0>();
    const int num_rows = experts.counts[expert];
    if (add_splits(sums, partial, arrived, expert, num_rows)) {
      row* own_rows = out + static_cast<long long>(experts.out_starts[expert]) * part.outputs;
      write_rows<IS_GATED>(sums, experts.biases[expert], own_rows, num_rows, part.outputs, alpha, limit);
    }
  }
}

__device__ inline Part find_part(int outputs, int inputs, int split_inputs) {
  const int begin = blockIdx.y * split_inputs;
  return {outputs, inputs, begin, min(inputs - begin, split_inputs)};
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    multiply_few(const row* x, row* out, float4* partial, int* arrived, Experts experts, int num_experts, int outputs,
                 int inputs, int split_inputs) {
  const Part part = find_part(outputs, inputs, split_inputs);
  multiply<false>(x, out, partial, arrived, experts, num_experts, part, 0.0f, 0.0f);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    gate_up_few(const row* x, row* out, float4* partial, int* arrived, Experts experts, int num_experts, int outputs,
                int inputs, int split_inputs, float alpha, float limit) {
  const Part part = find_part(outputs, inputs, split_inputs);
  multiply<true>(x, out, partial, arrived, experts, num_experts, part, alpha, limit);
}
