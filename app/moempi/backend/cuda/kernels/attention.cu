// Causal attention of single rows over a paged cache; the keys of a row are divided among blocks (Dao et al. 2023,
// split-KV).
//
//   attend_rows    per row, key-value head and split of SPLIT keys, for up to HEADS of the query heads that share the
//                  key-value head: sum of exp(score - highest) * value, highest score, and sum of exp(score - highest);
//                  if there is one split, the output at once
//   merge_splits   out = sum of the splits' sums, rescaled to one highest score, over the divisor; `sinks` add to the
//                  divisor only
//
// Shapes: queries (T, H, HEAD_DIM), out (T, H, VALUE_DIM), spans (T, 2) as in kv_cache.cu, sums (T, H, splits,
// VALUE_DIM), stats (T, H, splits, 2) with the highest score first. HEAD_DIM and VALUE_DIM, at most 1,024, and HEADS
// are compile-time constants. Keys and values are read once; a warp reads one page. Adjacent blocks read adjacent heads
// of the same keys, so what the GPU reads at one time is contiguous. A row's bits do not depend on its batch.
// Launch: attend_rows (key-value heads * ceil(shared / HEADS), splits, T) blocks of 128; merge_splits (T, H) blocks of
// 128. NumPy twin: attend.
#include "paging.cuh"

const int THREADS = 128, WARPS = THREADS / WARP_THREADS;
const int SPLIT = WARPS * PAGE_ROWS;  // keys per block; equals SPLIT_KEYS of cuda/attention.py

__device__ constexpr int power_of_two(int least) { return least <= 1 ? 1 : 2 * power_of_two((least + 1) / 2); }

// Warp lanes that read one row of `eights` times eight numbers; all work if a power of two from 8 on divides `eights`.
__device__ constexpr int lanes_of_row(int eights) {
  return eights % 32 == 0 ? 32 : eights % 16 == 0 ? 16 : eights % 8 == 0 ? 8 : eights < 32 ? power_of_two(eights) : 32;
}

// How a warp reads a page of rows of DIM numbers: LANES lanes read a row in STEPS steps, each lane eight numbers a
// step; TOGETHER rows are read at once, and IN_FLIGHT times that before the first is used.
template <int DIM>
struct Reading {
  static const int EIGHTS = (DIM + 7) / 8, LANES = lanes_of_row(EIGHTS), STEPS = (EIGHTS + LANES - 1) / LANES;
  static const int TOGETHER = WARP_THREADS / LANES;
  static const int IN_FLIGHT = PAGE_ROWS / TOGETHER < 4 ? PAGE_ROWS / TOGETHER : 4, GROUP = TOGETHER * IN_FLIGHT;
};
typedef Reading<HEAD_DIM> Keys;
typedef Reading<VALUE_DIM> Values;

// Blocks per multiprocessor that leave each thread the registers for its sums and for IN_FLIGHT loads.
const int EIGHTS_HELD = (HEADS * Values::STEPS + (Keys::STEPS > 1)) * static_cast<int>(sizeof(row)) / 2;
const int LEAST_BLOCKS = EIGHTS_HELD == 1 ? 8 : EIGHTS_HELD <= 3 ? 5 : EIGHTS_HELD <= 9 ? 4 : 2;
const bool IS_WHOLE = HEAD_DIM % 8 == 0 && VALUE_DIM % 8 == 0;  // all eights of the cache exist and are aligned

// Fetch the eights of the IN_FLIGHT rows of a page from `own_row` on; in place of a row outside [first, last), the
// nearest row inside. All loads start before this thread waits for one.
template <int DIM>
__device__ inline void fetch_rows(Eight<row>* held, const row* page, int stride, int own_row, int eight, int first,
                                  int last) {
  const int column = min(eight, Reading<DIM>::EIGHTS - 1) * 8;
#pragma unroll
  for (int i = 0; i < Reading<DIM>::IN_FLIGHT; ++i) {
    const int key = min(max(own_row + i * Reading<DIM>::TOGETHER, first), last - 1);
    const row* from = page + column + key * stride;
    held[i] = IS_WHOLE ? read8(from) : fetch8(from, DIM - column);
  }
}

// Sums of COUNT values over each LANES adjacent warp lanes: in place of its values, lane l of the LANES gets the sums
// from number l * COUNT / LANES on, at least one. Each step moves half of the values that are left, so there are fewer
// shuffles than in a sum at a time.
template <int COUNT, int LANES>
__device__ inline void scatter_sums(float* values) {
  if constexpr (LANES > 1) {
    const int APART = LANES / 2, LEFT = COUNT > 1 ? COUNT / 2 : 1;
    const bool keeps_upper = COUNT > 1 && threadIdx.x & APART;
#pragma unroll
    for (int i = 0; i < LEFT; ++i) {
      const float upper = values[COUNT > 1 ? i + LEFT : i];
      const float kept = keeps_upper ? upper : values[i], sent = keeps_upper ? values[i] : upper;
      values[i] = kept + __shfl_xor_sync(FULL_WARP, sent, APART);
    }
    scatter_sums<LEFT, APART>(values);
  }
}

// Scores of the page's keys [first, last) with HEADS queries, into scores[key][head].
__device__ inline void score_page(const row* page, int stride, const float (*queries)[Keys::EIGHTS * 8],
                                  float (*scores)[HEADS], int first, int last) {
  const int lane = threadIdx.x % WARP_THREADS, own_key = lane / Keys::LANES, own_eight = lane % Keys::LANES;
  const int COUNT = power_of_two(Keys::IN_FLIGHT * HEADS), OWN_SUMS = COUNT > Keys::LANES ? COUNT / Keys::LANES : 1;
  for (int group = first / Keys::GROUP * Keys::GROUP; group < last; group += Keys::GROUP) {
    float sums[COUNT] = {};  // number i * HEADS + head
#pragma unroll 1
    for (int step = 0; step < Keys::STEPS; ++step) {
      const int eight = step * Keys::LANES + own_eight;
      Eight<row> held[Keys::IN_FLIGHT];
      fetch_rows<HEAD_DIM>(held, page, stride, group + own_key, eight, first, last);
      if (eight >= Keys::EIGHTS) break;
#pragma unroll
      for (int i = 0; i < Keys::IN_FLIGHT; ++i) {
        float numbers[8];
        unpack8(held[i], numbers);
#pragma unroll
        for (int head = 0; head < HEADS; ++head)
#pragma unroll
          for (int n = 0; n < 8; ++n) sums[i * HEADS + head] += queries[head][eight * 8 + n] * numbers[n];
      }
    }
    scatter_sums<COUNT, Keys::LANES>(sums);
#pragma unroll
    for (int i = 0; i < OWN_SUMS; ++i) {
      const int number = own_eight * COUNT / Keys::LANES + i, key = group + number / HEADS * Keys::TOGETHER + own_key;
      if (number < Keys::IN_FLIGHT * HEADS) scores[key][number % HEADS] = sums[i];
    }
  }
}

// Replace a page's scores of a head by exp(score - highest), and by 0 outside [first, last); `stats` gets the highest
// score and the sum. A warp lane has two keys.
__device__ inline void exponentiate(float (*scores)[HEADS], int head, int first, int last, float* stats) {
  const int low = threadIdx.x % WARP_THREADS, high = low + WARP_THREADS;
  const bool sees_low = low >= first && low < last, sees_high = high >= first && high < last;
  const float low_score = sees_low ? scores[low][head] : -infinity();
  const float high_score = sees_high ? scores[high][head] : -infinity();
  const float highest = warp_max(fmaxf(low_score, high_score));
  const float low_weight = sees_low ? expf(low_score - highest) : 0.0f;
  const float high_weight = sees_high ? expf(high_score - highest) : 0.0f;
  scores[low][head] = low_weight, scores[high][head] = high_weight;
  const float total = warp_sum(low_weight + high_weight);
  if (low == 0) stats[0] = highest, stats[1] = total;
}

// mixed[step][head] = sum over the page's keys of their weights times their values, eight numbers; lanes that read the
// same columns get the same sum.
__device__ inline void mix_page(const row* page, int stride, const float (*weights)[HEADS],
                                float (*mixed)[HEADS][8], int first, int last) {
  const int lane = threadIdx.x % WARP_THREADS, own_key = lane / Values::LANES, own_eight = lane % Values::LANES;
  for (int group = first / Values::GROUP * Values::GROUP; group < last; group += Values::GROUP)
#pragma unroll
    for (int step = 0; step < Values::STEPS; ++step) {
      Eight<row> held[Values::IN_FLIGHT];
      fetch_rows<VALUE_DIM>(held, page, stride, group + own_key, step * Values::LANES + own_eight, first, last);
#pragma unroll
      for (int i = 0; i < Values::IN_FLIGHT; ++i) {
        float numbers[8];
        unpack8(held[i], numbers);
#pragma unroll
        for (int head = 0; head < HEADS; ++head) {
          const float weight = weights[group + i * Values::TOGETHER + own_key][head];
#pragma unroll
          for (int n = 0; n < 8; ++n) mixed[step][head][n] += weight * numbers[n];
        }
      }
    }
#pragma unroll
  for (int step = 0; step < Values::STEPS; ++step)
#pragma unroll
    for (int head = 0; head < HEADS; ++head)
#pragma unroll
      for (int n = 0; n < 8; ++n)
        for (int apart = Values::LANES; apart < WARP_THREADS; apart *= 2)
          mixed[step][head][n] += __shfl_xor_sync(FULL_WARP, mixed[step][head][n], apart);
}

// A vector's splits: `sums` (splits, VALUE_DIM) and `stats` (splits, 2). The output is the same in attend_rows, which
// calls this with one split, as in merge_splits with further splits that have no keys.
struct Merge {
  float highest, divisor;
  __device__ inline Merge(const float* stats, int splits, const row* sink) {
    highest = sink ? widen(*sink) : -infinity();
    for (int split = 0; split < splits; ++split) highest = fmaxf(highest, stats[2 * split]);
    divisor = sink ? expf(widen(*sink) - highest) : 0.0f;
    for (int split = 0; split < splits; ++split)
      divisor = fmaf(stats[2 * split + 1], expf(stats[2 * split] - highest), divisor);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS)
    attend_rows(const row* queries, const row* keys, const row* values, const row* sinks, const int* spans,
                const int* pages, float* sums, float* stats, row* out, int heads, int kv_heads, int value_stride,
                float scale, int window) {
  __shared__ __align__(16) float scaled[HEADS][Keys::EIGHTS * 8], all_scores[WARPS][PAGE_ROWS][HEADS];
  __shared__ __align__(16) float partial[WARPS][Values::EIGHTS * 8], warp_stats[HEADS][WARPS][2];
  const long long token = blockIdx.z;
  const int shared = heads / kv_heads, rounds = (shared + HEADS - 1) / HEADS, splits = gridDim.y, split = blockIdx.y;
  const int kv_head = blockIdx.x / rounds, first_head = kv_head * shared + blockIdx.x % rounds * HEADS;
  const int own_heads = min(HEADS, (kv_head + 1) * shared - first_head);
  const int position = spans[2 * token];
  const int seen_from = window ? max(0, position - window + 1) : 0;
  if (split * SPLIT > position || (split + 1) * SPLIT <= seen_from) {
    if (static_cast<int>(threadIdx.x) < own_heads) {
      float* stat = stats + ((token * heads + first_head + threadIdx.x) * splits + split) * 2;
      stat[0] = -infinity(), stat[1] = 0.0f;
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < HEADS * Keys::EIGHTS * 8; i += THREADS) {
    const int head = i / (Keys::EIGHTS * 8), column = i % (Keys::EIGHTS * 8);
    const bool exists = head < own_heads && column < HEAD_DIM;
    const row* query = queries + (token * heads + first_head + head) * HEAD_DIM;
    scaled[head][column] = exists ? widen(query[column]) * scale : 0.0f;
  }
  const int warp = threadIdx.x / WARP_THREADS, lane = threadIdx.x % WARP_THREADS, page = split * WARPS + warp;
  const int first = max(0, seen_from - page * PAGE_ROWS), last = min(PAGE_ROWS, position + 1 - page * PAGE_ROWS);
  const long long cache_row = first < last ? pages[spans[2 * token + 1] + page] * static_cast<long long>(PAGE_ROWS) : 0;
  const long long cache_head = cache_row * kv_heads + kv_head;
  float(*scores)[HEADS] = all_scores[warp], mixed[Values::STEPS][HEADS][8] = {};
  __syncthreads();
  score_page(keys + cache_head * HEAD_DIM, kv_heads * HEAD_DIM, scaled, scores, first, last);
  __syncwarp();
  for (int head = 0; head < HEADS; ++head) exponentiate(scores, head, first, last, warp_stats[head][warp]);
  __syncwarp();
  mix_page(values + cache_head * value_stride, kv_heads * value_stride, scores, mixed, first, last);
#pragma unroll
  for (int head = 0; head < HEADS; ++head) {
    __syncthreads();
#pragma unroll
    for (int step = 0; step < Values::STEPS; ++step)
      if (const int eight = step * Values::LANES + lane; lane < Values::LANES && eight < Values::EIGHTS)
#pragma unroll
        for (int n = 0; n < 8; ++n) partial[warp][eight * 8 + n] = mixed[step][head][n];
    __syncthreads();
    if (head >= own_heads) continue;
    const Merge of_warps(warp_stats[head][0], WARPS, nullptr);
    const float split_stats[2] = {of_warps.highest, of_warps.divisor};
    const Merge whole(split_stats, 1, sinks ? sinks + first_head + head : nullptr);
    const long long vector = token * heads + first_head + head;
    for (int column = threadIdx.x; column < VALUE_DIM; column += THREADS) {
      float total = 0.0f;
      for (int other = 0; other < WARPS; ++other)
        total = fmaf(partial[other][column], expf(warp_stats[head][other][0] - of_warps.highest), total);
      const float output = fmaf(total, expf(of_warps.highest - whole.highest), 0.0f) / whole.divisor;
      if (splits > 1) sums[(vector * splits + split) * VALUE_DIM + column] = total;
      else narrow(output, out + vector * VALUE_DIM + column);
    }
    if (splits > 1 && threadIdx.x < 2) stats[(vector * splits + split) * 2 + threadIdx.x] = split_stats[threadIdx.x];
  }
}

extern "C" __global__ void merge_splits(const float* sums, const float* stats, const row* sinks, row* out, int splits) {
  const int heads = gridDim.y, head = blockIdx.y;
  const long long vector = static_cast<long long>(blockIdx.x) * heads + head;
  stats += vector * splits * 2, sums += vector * splits * VALUE_DIM;
  const Merge whole(stats, splits, sinks ? sinks + head : nullptr);
  for (int column = threadIdx.x; column < VALUE_DIM; column += THREADS) {
    float total = 0.0f;
#pragma unroll 4
    for (int split = 0; split < splits; ++split) {
      const long long at = static_cast<long long>(split) * VALUE_DIM + column;
      const float sum = stats[2 * split + 1] > 0.0f ? sums[at] : 0.0f;  // a split without keys has no sums
      total = fmaf(sum, expf(stats[2 * split] - whole.highest), total);
    }
    narrow(total / whole.divisor, out + vector * VALUE_DIM + column);
  }
}
