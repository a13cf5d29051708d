// Sparse attention (DeepSeek-V3.2, 2025): an indexer's scores, the positions that it chooses, and their rows of a cache.
//
//   index_scores      scores[t, s] = sum over heads h, in order, of weights[t, h] * max(0, queries[t, h] . key of s), for
//                     the positions s that row t sees
//   choose_positions  positions[t] = the `top_k` positions of the largest scores, ascending; the lowest on a tie, and NaN
//                     counts as infinity                                                    NumPy: select_positions
//   take_positions    out[t, i] = the row of the cache of positions[t, i]                   NumPy: attend_selected
//
// Shapes: queries (T, H, dim), weights (T, H), keys and cache as in kv_cache.cu with one head, spans (T, 2) as there,
// scores (T, width), positions (T, top_k), out (T, out_rows, width). A row's bits do not depend on its batch.
// Launch: index_scores (pages, T) blocks of PAGE_ROWS, a thread for each position; choose_positions T blocks of 256;
// take_positions (top_k, T, segments of a row) blocks of SEGMENT_THREADS.
#include "paging.cuh"

const int HEADS_TOGETHER = 4;  // that use a key in registers
const int THREADS = 256, WARPS = THREADS / WARP_THREADS;
const int DIGITS = 256;  // values of the byte by which scores are sorted at a time

extern "C" __global__ void index_scores(const row* queries, const float* weights, const row* keys, const int* spans,
                                        const int* pages, float* scores, int heads, int dim, long long width) {
  const long long token = blockIdx.y;
  const int position = blockIdx.x * PAGE_ROWS + threadIdx.x;
  if (position > spans[2 * token]) return;
  const row* key = keys + cache_row(pages + spans[2 * token + 1], position) * dim;
  queries += token * heads * dim, weights += token * heads;
  float score = 0.0f;
  for (int head = 0; head < heads; head += HEADS_TOGETHER) {
    float sums[HEADS_TOGETHER] = {};
    for (int column = 0; column < dim; column += 8) {
      float numbers[8];
      load8(key + column, dim - column, numbers);
#pragma unroll
      for (int i = 0; i < HEADS_TOGETHER; ++i) {
        float query[8];
        load8(queries + min(head + i, heads - 1) * dim + column, dim - column, query);
#pragma unroll
        for (int n = 0; n < 8; ++n) sums[i] = fmaf(query[n], numbers[n], sums[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < HEADS_TOGETHER; ++i)
      if (head + i < heads) score = fmaf(weights[head + i], sums[i] < 0.0f ? 0.0f : sums[i], score);
  }
  scores[token * width + position] = score;
}

// Bits that are larger for a larger score, the same for both zeros.
__device__ inline unsigned ordered(float score) {
  const unsigned bits = __float_as_uint(score != score ? infinity() : score == 0.0f ? 0.0f : score);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The bits of the `rank`-th largest of `count` scores, and in *rank how many of the scores with these bits are needed.
__device__ inline unsigned threshold(const float* scores, int count, int* rank) {
  __shared__ int counts[DIGITS], needed;
  __shared__ unsigned found;
  if (threadIdx.x == 0) found = 0, needed = *rank;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int digit = threadIdx.x; digit < DIGITS; digit += THREADS) counts[digit] = 0;
    __syncthreads();
    const unsigned known = shift == 24 ? 0u : ~0u << (shift + 8), prefix = found;
    for (int s = threadIdx.x; s < count; s += THREADS) {
      const unsigned bits = ordered(scores[s]);
      if ((bits & known) == prefix) atomicAdd(counts + (bits >> shift & (DIGITS - 1)), 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = DIGITS - 1;
      for (; counts[digit] < needed; --digit) needed -= counts[digit];
      found = prefix | static_cast<unsigned>(digit) << shift;
    }
    __syncthreads();
  }
  *rank = needed;
  return found;
}

extern "C" __global__ void choose_positions(const float* scores, const int* spans, int* positions, int top_k,
                                            long long width) {
  __shared__ int warp_above[WARPS], warp_ties[WARPS];
  const int count = spans[2 * blockIdx.x] + 1, lane = threadIdx.x % WARP_THREADS, warp = threadIdx.x / WARP_THREADS;
  scores += blockIdx.x * width, positions += static_cast<long long>(blockIdx.x) * top_k;
  int ties_needed = top_k, above = 0, ties = 0;  // those before the positions of this round
  const unsigned least = threshold(scores, count, &ties_needed);
  for (int first = 0; first < count; first += THREADS) {
    const int position = first + threadIdx.x;
    const unsigned bits = position < count ? ordered(scores[position]) : 0u;
    const bool is_above = position < count && bits > least, is_tie = position < count && bits == least;
    const unsigned all_above = __ballot_sync(FULL_WARP, is_above), all_ties = __ballot_sync(FULL_WARP, is_tie);
    __syncthreads();  // the counts of the round before have been read
    if (lane == 0) warp_above[warp] = __popc(all_above), warp_ties[warp] = __popc(all_ties);
    __syncthreads();
    const unsigned lanes_before = (1u << lane) - 1u;
    int own_above = above + __popc(all_above & lanes_before), own_ties = ties + __popc(all_ties & lanes_before);
    for (int other = 0; other < WARPS; ++other) {
      if (other < warp) own_above += warp_above[other], own_ties += warp_ties[other];
      above += warp_above[other], ties += warp_ties[other];
    }
    if (is_above || (is_tie && own_ties < ties_needed)) positions[own_above + min(own_ties, ties_needed)] = position;
  }
}

extern "C" __global__ void take_positions(const row* cache, const int* positions, const int* spans, const int* pages,
                                          row* out, int out_rows, int width) {
  const long long token = blockIdx.y;
  const int position = positions[token * gridDim.x + blockIdx.x];
  const row* from = cache + cache_row(pages + spans[2 * token + 1], position) * width;
  copy_segment(from, out + (token * out_rows + blockIdx.x) * width, blockIdx.z, width);
}
