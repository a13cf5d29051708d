// Causal attention of many rows of a sequence on the warpgroups of compute capability 9.0 (Shah et al. 2024).
//
//   attend_tiles   softmax(q k * scale) v of a tile of up to 128 queries of one head, page by page of the cache
//
// The same function and shapes as attention_tiles.cu, with tiles of 128 queries. HEAD_DIM and VALUE_DIM are 64 or 128. A
// warpgroup has 64 queries; both multiply with the same pages. While the tensor cores multiply the values of one page,
// the probabilities of the next are computed, and the pages after it are copied.
// Launch: (n, H) blocks of 256, and STAGES pages of keys and values in dynamic shared memory. NumPy twin: attend; plain
// CUDA twin: attend_rows.
#include "attention_rows.cuh"
#include "warpgroup.cuh"

const int THREADS = 256, PAGES_AHEAD = 3, STAGES = PAGES_AHEAD + 1;
const int KEY_NUMBERS = PAGE_ROWS * HEAD_DIM, PAGE_NUMBERS = PAGE_ROWS * (HEAD_DIM + VALUE_DIM);
const int PANEL_BYTES = PAGE_ROWS * PANEL_ROW_BYTES;

// The pieces (eight numbers) of a page's rows that a thread copies: the same piece of every STEP-th row. The rows of a
// page are `stride` numbers apart. STEP is a multiple of SWIZZLE_ROWS, so that only the row changes the place.
template <int DIM>
struct CopiedPieces {
  static const int EIGHTS = DIM / 8, STEP = THREADS / EIGHTS;
  const unsigned short* from;
  unsigned short* to;
  long long page_stride, step_stride;

  __device__ CopiedPieces(const row* cache, unsigned short* staged, int kv_head, int kv_heads) {
    const int first = threadIdx.x / EIGHTS, eight = threadIdx.x % EIGHTS;
    const long long stride = static_cast<long long>(kv_heads) * DIM;
    from = cache + first * stride + kv_head * DIM + eight * 8;
    to = staged + panel_offset(first, eight, PAGE_ROWS);
    page_stride = PAGE_ROWS * stride, step_stride = STEP * stride;
  }

  __device__ void begin(int page, int stage) const {
    const unsigned short* piece = from + page * page_stride;
#pragma unroll
    for (int step = 0; step < PAGE_ROWS / STEP; ++step, piece += step_stride)
      begin_copy(to + stage * PAGE_NUMBERS + step * STEP * PANEL_WIDTH, piece);
  }
};

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

// Turn a page's scores, multiplied by `scale`, into probabilities relative to the highest score so far. `shrinks` rescale
// earlier sums to it. A row sees the keys from `least` to `most` of the page.
__device__ inline void weigh(float (*scores)[4], float* shrinks, RowStats& stats, float scale, const int* least,
                             const int* most) {
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
    shrinks[half] = shrink;
  }
}

__device__ inline void round_probabilities(unsigned (*probabilities)[4], const float (*scores)[4]) {
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
  const CopiedPieces<HEAD_DIM> copied_keys(keys, staged, kv_head, kv_heads);
  const CopiedPieces<VALUE_DIM> copied_values(values, staged + KEY_NUMBERS, kv_head, kv_heads);
  const auto begin_page = [&](int page) {
    if (page < num_pages) {
      const int stage = page % STAGES, number = pages[page];
      copied_keys.begin(number, stage);
      copied_values.begin(number, stage);
    }
    end_copies();
  };
  for (int page = 0; page < PAGES_AHEAD; ++page) begin_page(page);
  unsigned query_fragments[HEAD_DIM / 16][4];
  load_queries(query_fragments, queries + (static_cast<long long>(first_row) * heads + head) * HEAD_DIM, warp * WARP_ROWS,
               count, heads);
  float mixed[VALUE_DIM / 8][4] = {}, scores[PAGE_ROWS / 8][4];
  unsigned probabilities[PAGE_ROWS / 16][4];
  RowStats stats = {{-infinity(), -infinity()}, {0.0f, 0.0f}};
  const unsigned shared = shared_address(staged);
  // The highest scores of page `page`, after its scores are there and before its probabilities are multiplied.
  const auto weigh_page = [&](int page, float* shrinks) {
    int least[2], most[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = position + warp * WARP_ROWS + g + half * 8 - (first_page + page) * PAGE_ROWS;
      least[half] = window ? own - window + 1 : 0, most[half] = own;
    }
    weigh(scores, shrinks, stats, scale * LOG2_E, least, most);
  };
  float shrinks[2];
  await_groups_but<PAGES_AHEAD - 1>();
  publish_copies();
  __syncthreads();
  start_scores(scores, query_fragments, shared);
  await_products_but<0>();
  weigh_page(0, shrinks);
  round_probabilities(probabilities, scores);
  for (int page = 0; page + 1 < num_pages; ++page) {
    await_groups_but<PAGES_AHEAD - 2>();
    publish_copies();
    __syncthreads();  // page + 1 is there; all warps have read page - 1, whose place the new page takes
    begin_page(page + PAGES_AHEAD);
    start_scores(scores, query_fragments, shared + (page + 1) % STAGES * PAGE_NUMBERS * 2);
    start_values(mixed, probabilities, shared + (page % STAGES * PAGE_NUMBERS + KEY_NUMBERS) * 2);
    await_products_but<1>();  // the scores
    weigh_page(page + 1, shrinks);
    await_products_but<0>();
#pragma unroll
    for (int eights = 0; eights < VALUE_DIM / 8; ++eights)
#pragma unroll
      for (int i = 0; i < 4; ++i) mixed[eights][i] *= shrinks[i / 2];
    round_probabilities(probabilities, scores);
  }
  start_values(mixed, probabilities, shared + ((num_pages - 1) % STAGES * PAGE_NUMBERS + KEY_NUMBERS) * 2);
  await_products_but<0>();
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
