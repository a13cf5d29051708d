// Causal attention of many rows of a sequence on tensor cores; the score matrix is never in memory (Dao 2023).
//
//   attend_tiles   softmax(q k * scale) v of a tile of up to 64 queries of one head, page by page of the cache
//
// Shapes: queries (T, H, HEAD_DIM), out (T, H, VALUE_DIM), tiles (n, 4): row and position of the first query, number of
// queries, index of the sequence's first page in `pages`. Rows are bfloat16. HEAD_DIM and VALUE_DIM, compile-time
// constants, are multiples of 16 up to 128. Memory is aligned to 16 bytes. Probabilities are rounded to bfloat16 before
// they are multiplied with the values. A warp has 16 queries. A page's values are copied while its keys are multiplied,
// the next page's keys while its values are.
// Launch: (n, H) blocks of 128. NumPy twin: attend; plain CUDA twin: attend_rows.
#include "attention_rows.cuh"

const int THREADS = 128, TILE = 64;
// Rows of shared memory are padded so that they start in different banks.
const int KEY_WIDTH = HEAD_DIM + 8, VALUE_WIDTH = VALUE_DIM + 8;

template <int DIM, int WIDTH>
__device__ inline void begin_page(unsigned short* to, const row* cache, int page, int kv_head, int kv_heads) {
  for (int piece = threadIdx.x; piece < PAGE_ROWS * DIM / 8; piece += THREADS) {
    const int key = piece / (DIM / 8), column = piece % (DIM / 8) * 8;
    const long long from = (static_cast<long long>(page) * PAGE_ROWS + key) * kv_heads + kv_head;
    begin_copy(to + key * WIDTH + column, cache + from * DIM + column);
  }
}

// scores (16 x 64 per warp) = queries times the page's keys.
__device__ inline void multiply_keys(float (*scores)[4], const unsigned (*queries)[4], const unsigned short* keys) {
  const int lane = threadIdx.x % WARP_THREADS, matrix = lane / 8;
  for (int eights = 0; eights < TILE / 8; ++eights)
    for (int i = 0; i < 4; ++i) scores[eights][i] = 0.0f;
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step)
#pragma unroll
    for (int eights = 0; eights < TILE / 8; eights += 2) {
      unsigned fragment[4];
      load_matrices(fragment, keys + ((eights + matrix / 2) * 8 + lane % 8) * KEY_WIDTH + step * 16 + matrix % 2 * 8);
      multiply_add(scores[eights], queries[step], fragment);
      multiply_add(scores[eights + 1], queries[step], fragment + 2);
    }
}

// mixed (16 x VALUE_DIM) += probabilities times the page's values.
__device__ inline void multiply_values(float (*mixed)[4], const float (*scores)[4], const unsigned short* values) {
  const int lane = threadIdx.x % WARP_THREADS, matrix = lane / 8;
#pragma unroll
  for (int step = 0; step < TILE / 16; ++step) {
    const float *low = scores[2 * step], *high = scores[2 * step + 1];
    const unsigned a[4] = {bfloat16_pair(low[0], low[1]), bfloat16_pair(low[2], low[3]),
                           bfloat16_pair(high[0], high[1]), bfloat16_pair(high[2], high[3])};
#pragma unroll
    for (int eights = 0; eights < VALUE_DIM / 8; eights += 2) {
      unsigned fragment[4];
      const int key = step * 16 + matrix % 2 * 8 + lane % 8;
      load_transposed(fragment, values + key * VALUE_WIDTH + (eights + matrix / 2) * 8);
      multiply_add(mixed[eights], a, fragment);
      multiply_add(mixed[eights + 1], a, fragment + 2);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attend_tiles(const row* queries, const row* keys, const row* values, const row* sinks, const int* tiles,
                 const int* pages, row* out, int kv_heads, float scale, int window) {
  __shared__ __align__(16) unsigned short page_keys[TILE * KEY_WIDTH], page_values[TILE * VALUE_WIDTH];
  const int heads = gridDim.y, head = blockIdx.y, kv_head = head / (heads / kv_heads);
  const int* tile = tiles + 4 * blockIdx.x;
  const int first_row = tile[0], position = tile[1], count = tile[2];
  pages += tile[3];
  const int warp = threadIdx.x / WARP_THREADS, lane = threadIdx.x % WARP_THREADS, g = lane / 4, t = lane % 4;
  unsigned query_fragments[HEAD_DIM / 16][4];
  load_queries(query_fragments, queries + (static_cast<long long>(first_row) * heads + head) * HEAD_DIM, warp * WARP_ROWS,
               count, heads);
  float mixed[VALUE_DIM / 8][4] = {};
  float highest[2] = {-infinity(), -infinity()}, total[2] = {0.0f, 0.0f};
  const int first_page = window ? max(0, position - window + 1) / PAGE_ROWS : 0;
  const int last_page = (position + count - 1) / PAGE_ROWS;
  begin_page<HEAD_DIM, KEY_WIDTH>(page_keys, keys, pages[first_page], kv_head, kv_heads);
  for (int page = first_page; page <= last_page; ++page) {
    await_copies();
    __syncthreads();
    begin_page<VALUE_DIM, VALUE_WIDTH>(page_values, values, pages[page], kv_head, kv_heads);
    float scores[TILE / 8][4];
    multiply_keys(scores, query_fragments, page_keys);
    await_copies();
    __syncthreads();
    if (page < last_page) begin_page<HEAD_DIM, KEY_WIDTH>(page_keys, keys, pages[page + 1], kv_head, kv_heads);
    for (int half = 0; half < 2; ++half) {  // rows g and g + 8 of the warp
      const int own = position + warp * WARP_ROWS + g + half * 8;
      float best = highest[half];
      for (int eights = 0; eights < TILE / 8; ++eights)
        for (int i = 0; i < 2; ++i) {
          const int key = page * PAGE_ROWS + eights * 8 + 2 * t + i;
          float& score = scores[eights][2 * half + i];
          const bool is_seen = key <= own && (!window || key > own - window);
          score = is_seen ? score * (scale * LOG2_E) : -infinity();
          best = fmaxf(best, score);
        }
      best = group_max(best);
      const float base = best == -infinity() ? 0.0f : best;  // no key seen yet
      const float shrink = exp2f(highest[half] - base);
      highest[half] = best;
      total[half] *= shrink;
      for (int eights = 0; eights < TILE / 8; ++eights)
        for (int i = 0; i < 2; ++i) total[half] += scores[eights][2 * half + i] = exp2f(scores[eights][2 * half + i] - base);
      for (int eights = 0; eights < VALUE_DIM / 8; ++eights)
        for (int i = 0; i < 2; ++i) mixed[eights][2 * half + i] *= shrink;
    }
    multiply_values(mixed, scores, page_values);
  }
  for (int half = 0; half < 2; ++half) {
    const int query = warp * WARP_ROWS + g + half * 8;
    float divisor = group_sum(total[half]), factor = 1.0f;
    if (sinks) {
      const float sink = widen(sinks[head]) * LOG2_E, common = fmaxf(sink, highest[half]);
      factor = exp2f(highest[half] - common);
      divisor = divisor * factor + exp2f(sink - common);
    }
    if (query >= count) continue;
    row* to = out + (static_cast<long long>(first_row + query) * heads + head) * VALUE_DIM;
    for (int eights = 0; eights < VALUE_DIM / 8; ++eights)
      *reinterpret_cast<unsigned*>(to + eights * 8 + 2 * t) =
          bfloat16_pair(mixed[eights][2 * half] * factor / divisor, mixed[eights][2 * half + 1] * factor / divisor);
  }
}
