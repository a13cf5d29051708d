// Causal attention of many rows of a sequence on the warpgroups of compute capability 9.0 (Shah et al. 2024).
//
//   attend_tiles   softmax(q k * scale) v of a tile of up to 128 queries of one head, page by page of the cache
//
// The same function and shapes as attention_tiles.cu, with tiles of 128 queries. HEAD_DIM and VALUE_DIM are 64 or 128. A
// warpgroup has 64 queries; both multiply with the same pages. While the probabilities of one page are computed, the
// tensor cores multiply the keys of the next, and the page after it is copied.
// Launch: (n, H) blocks of 256, STAGES * PAGE_BYTES of dynamic shared memory. NumPy twin: attend; plain CUDA twin:
// attend_rows.
#include "paging.cuh"
#include "warpgroup.cuh"

const int THREADS = 256, TILE = 128, WARP_ROWS = 16, STAGES = 3;
const int KEY_NUMBERS = PAGE_ROWS * HEAD_DIM, PAGE_NUMBERS = PAGE_ROWS * (HEAD_DIM + VALUE_DIM);
const int PANEL_BYTES = PAGE_ROWS * PANEL_ROW_BYTES;
const float LOG2_E = 1.44269504f;

template <int DIM>
__device__ inline void begin_rows(unsigned short* to, const row* cache, int page, int kv_head, int kv_heads) {
  for (int piece = threadIdx.x; piece < PAGE_ROWS * DIM / 8; piece += THREADS) {
    const int key = piece / (DIM / 8), eight = piece % (DIM / 8);
    const long long from = (static_cast<long long>(page) * PAGE_ROWS + key) * kv_heads + kv_head;
    begin_copy(to + panel_offset(key, eight, PAGE_ROWS), cache + from * DIM + eight * 8);
  }
}

// A row of the scores is spread over a group of four warp lanes.
__device__ inline float group_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, 1));
  return fmaxf(value, __shfl_xor_sync(FULL_WARP, value, 2));
}
__device__ inline float group_sum(float value) {
  value += __shfl_xor_sync(FULL_WARP, value, 1);
  return value + __shfl_xor_sync(FULL_WARP, value, 2);
}

// The queries of a warp as fragments; rows beyond the end of the tile are zero.
__device__ inline void load_queries(unsigned (*fragments)[4], const row* queries, int first, int count, int heads) {
  const int lane = threadIdx.x % WARP_THREADS, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step)
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int query = first + g + part % 2 * 8, column = step * 16 + part / 2 * 8 + 2 * t;
      const row* from = queries + static_cast<long long>(query) * heads * HEAD_DIM + column;
      fragments[step][part] = query < count ? *reinterpret_cast<const unsigned*>(from) : 0u;
    }
}

// Start scores (64 x 64 per warpgroup) = queries times the page's keys.
__device__ inline void start_scores(float (*scores)[4], const unsigned (*queries)[4], unsigned keys) {
  begin_products();
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    const unsigned address = keys + step / 4 * PANEL_BYTES + step % 4 * 32;
    multiply_rows(scores, queries[step], describe_panels(address, PANEL_BYTES), step > 0);
  }
  end_products();
}

// Start mixed (64 x VALUE_DIM per warpgroup) += probabilities times the page's values.
__device__ inline void start_values(float (*mixed)[4], const unsigned (*probabilities)[4], unsigned values) {
  begin_products();
#pragma unroll
  for (int step = 0; step < PAGE_ROWS / 16; ++step) {
    const unsigned address = values + step * 16 * PANEL_ROW_BYTES;
    multiply_columns(mixed, probabilities[step], describe_panels(address, PANEL_BYTES), Width<VALUE_DIM>());
  }
  end_products();
}

// What a thread knows of rows g and g + 8 of its warp: highest score, own part of the sum of exponentials.
struct RowStats {
  float highest[2], total[2];
};

// Turn a page's scores, multiplied by `scale`, into probabilities, and rescale `mixed` to the new highest scores.
__device__ inline void weigh(float (*scores)[4], unsigned (*probabilities)[4], float (*mixed)[4], RowStats& stats,
                             float scale, const int* least, const int* most) {
  const int t = threadIdx.x % 4;
  const bool is_masked = least[0] > 0 || least[1] > 0 || min(most[0], most[1]) < PAGE_ROWS - 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float best = stats.highest[half];
    if (is_masked)
#pragma unroll
      for (int eights = 0; eights < PAGE_ROWS / 8; ++eights)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = eights * 8 + 2 * t + i;
          if (key < least[half] || key > most[half]) scores[eights][2 * half + i] = -infinity();
        }
#pragma unroll
    for (int eights = 0; eights < PAGE_ROWS / 8; ++eights)
      best = fmaxf(best, fmaxf(scores[eights][2 * half], scores[eights][2 * half + 1]));
    best = group_max(best);
    const float base = best == -infinity() ? 0.0f : best * scale;  // no key seen yet
    const float shrink = fast_exp2(stats.highest[half] * scale - base);
    stats.highest[half] = best;
    float sum = stats.total[half] * shrink;
#pragma unroll
    for (int eights = 0; eights < PAGE_ROWS / 8; ++eights)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[eights][2 * half + i];
        score = fast_exp2(score * scale - base);
        sum += score;
      }
    stats.total[half] = sum;
#pragma unroll
    for (int eights = 0; eights < VALUE_DIM / 8; ++eights)
#pragma unroll
      for (int i = 0; i < 2; ++i) mixed[eights][2 * half + i] *= shrink;
  }
#pragma unroll
  for (int step = 0; step < PAGE_ROWS / 16; ++step) {
    const float *low = scores[2 * step], *high = scores[2 * step + 1];
    probabilities[step][0] = bfloat16_pair(low[0], low[1]), probabilities[step][1] = bfloat16_pair(low[2], low[3]);
    probabilities[step][2] = bfloat16_pair(high[0], high[1]), probabilities[step][3] = bfloat16_pair(high[2], high[3]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend_tiles(const row* queries, const row* keys, const row* values, const row* sinks, const int* tiles,
                 const int* pages, row* out, int kv_heads, float scale, int window) {
  DYNAMIC_SHARED(unsigned short, staged);
  const int heads = gridDim.y, head = blockIdx.y, kv_head = head / (heads / kv_heads);
  const int* tile = tiles + 4 * (gridDim.x - 1 - blockIdx.x);  // the longest first
  const int first_row = tile[0], position = tile[1], count = tile[2];
  pages += tile[3];
  const int warp = threadIdx.x / WARP_THREADS, lane = threadIdx.x % WARP_THREADS, g = lane / 4, t = lane % 4;
  const int first_page = window ? max(0, position - window + 1) / PAGE_ROWS : 0;
  const int num_pages = (position + count - 1) / PAGE_ROWS + 1 - first_page;
  pages += first_page;
  const auto begin_page = [&](int page) {
    if (page < num_pages) {
      unsigned short* to = staged + page % STAGES * PAGE_NUMBERS;
      begin_rows<HEAD_DIM>(to, keys, pages[page], kv_head, kv_heads);
      begin_rows<VALUE_DIM>(to + KEY_NUMBERS, values, pages[page], kv_head, kv_heads);
    }
    end_copies();
  };
  begin_page(0);
  begin_page(1);
  unsigned query_fragments[HEAD_DIM / 16][4];
  load_queries(query_fragments, queries + (static_cast<long long>(first_row) * heads + head) * HEAD_DIM, warp * WARP_ROWS,
               count, heads);
  float mixed[VALUE_DIM / 8][4] = {}, scores[PAGE_ROWS / 8][4], next_scores[PAGE_ROWS / 8][4];
  RowStats stats = {{-infinity(), -infinity()}, {0.0f, 0.0f}};
  const unsigned shared = shared_address(staged);
  await_groups_but<1>();
  publish_copies();
  __syncthreads();
  start_scores(scores, query_fragments, shared);
  await_products();
  for (int page = 0; page < num_pages; ++page) {
    const unsigned stage = shared + page % STAGES * PAGE_NUMBERS * 2;
    const unsigned next_stage = shared + (page + 1) % STAGES * PAGE_NUMBERS * 2;
    await_groups_but<0>();
    publish_copies();
    __syncthreads();  // page + 1 is there; all warps have read page - 1, whose place page + 2 takes
    begin_page(page + 2);
    const bool has_next = page + 1 < num_pages;
    if (has_next) start_scores(next_scores, query_fragments, next_stage);
    int least[2], most[2];
    for (int half = 0; half < 2; ++half) {
      const int own = position + warp * WARP_ROWS + g + half * 8 - (first_page + page) * PAGE_ROWS;
      least[half] = window ? own - window + 1 : 0, most[half] = own;
    }
    unsigned probabilities[PAGE_ROWS / 16][4];
    weigh(scores, probabilities, mixed, stats, scale * LOG2_E, least, most);
    start_values(mixed, probabilities, stage + KEY_NUMBERS * 2);
    await_products();
#pragma unroll
    for (int eights = 0; eights < PAGE_ROWS / 8; ++eights)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[eights][i] = next_scores[eights][i];
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = warp * WARP_ROWS + g + half * 8;
    float divisor = group_sum(stats.total[half]), factor = 1.0f;
    if (sinks) {
      const float sink = widen(sinks[head]) * LOG2_E, highest = stats.highest[half] * scale * LOG2_E;
      const float common = fmaxf(sink, highest);
      factor = fast_exp2(highest - common);
      divisor = divisor * factor + fast_exp2(sink - common);
    }
    factor /= divisor;
    if (query >= count) continue;
    row* to = out + (static_cast<long long>(first_row + query) * heads + head) * VALUE_DIM;
#pragma unroll
    for (int eights = 0; eights < VALUE_DIM / 8; ++eights)
      *reinterpret_cast<unsigned*>(to + eights * 8 + 2 * t) =
          bfloat16_pair(mixed[eights][2 * half] * factor, mixed[eights][2 * half + 1] * factor);
  }
}
