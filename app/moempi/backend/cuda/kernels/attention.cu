// Causal attention of single rows over a paged cache; the keys of a row are divided among blocks (Dao et al. 2023,
// split-KV).
//
//   attend_rows   out = softmax of the scores of the keys that a row sees, times their values; `sinks` add to the
//                 divisor only                                                                NumPy twin: attend
//
// A block has a row, a key-value head, up to HEADS of the query heads that share it, and a split of SPLIT keys: it finds
// the sum of exp(score - highest) * value, the highest score, and the sum of exp(score - highest). If the row sees keys
// of one split, that is the output. Otherwise the block that is last for its row and heads adds up the splits, in their
// order, rescaled to one highest score.
//
// Queries whose last part is still to be rotated come in two arrays, the first numbers (T, H, VALUE_DIM) and `rotary`
// (T, H, HEAD_DIM - VALUE_DIM), which has strides in numbers; a block rotates its heads by the row's angles as it reads
// them, as by rotate in rope.cu. Otherwise `rotary` is null.                            NumPy twin: attend_latent
//
// Shapes: queries (T, H, HEAD_DIM), cosines and sines (T, pairs), out (T, H, VALUE_DIM), spans (T, 2) as in kv_cache.cu, sums (T, H, splits,
// VALUE_DIM), stats (T, H, splits, 2) with the highest score first; `arrived`, an int for each row and head group, is
// zero between launches. HEAD_DIM and VALUE_DIM, at most 1,024, and HEADS are compile-time constants. Keys and values
// are read once; a warp reads one page. Adjacent blocks read adjacent heads of the same keys, so what the GPU reads at
// one time is contiguous. A row's bits do not depend on its batch.
// Launch: (key-value heads * ceil(shared / HEADS), splits, T) blocks of 128.
#include "paging.cuh"
#include "rotation.cuh"

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
const int SPLITS_TOGETHER = HEADS == 1 ? 8 : 4;  // whose sums are fetched before the first is used
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

// The highest score of a head's parts and the divisor of its softmax; `stats` (parts, 2).
struct Merge {
  float highest, divisor;
  __device__ inline Merge(const float* stats, int parts, const row* sink) {
    highest = sink ? widen(*sink) : -infinity();
    for (int part = 0; part < parts; ++part) highest = fmaxf(highest, stats[2 * part]);
    divisor = sink ? expf(widen(*sink) - highest) : 0.0f;
    for (int part = 0; part < parts; ++part)
      divisor = fmaf(stats[2 * part + 1], expf(stats[2 * part] - highest), divisor);
  }
};

// The same by a warp, whose lanes read the stats of many splits together.
__device__ inline void merge_stats(const float* stats, int splits, const row* sink, float* highest, float* divisor) {
  const int lane = threadIdx.x % WARP_THREADS;
  float most = sink ? widen(*sink) : -infinity();
  for (int split = lane; split < splits; split += WARP_THREADS) most = fmaxf(most, stats[2 * split]);
  most = warp_max(most);
  float total = sink ? expf(widen(*sink) - most) : 0.0f;
  for (int first = 0; first < splits; first += WARP_THREADS) {
    const int own = min(first + lane, splits - 1);
    const float weight = expf(stats[2 * own] - most), sum = stats[2 * own + 1];
    for (int i = 0; i < WARP_THREADS && first + i < splits; ++i)
      total = fmaf(__shfl_sync(FULL_WARP, sum, i), __shfl_sync(FULL_WARP, weight, i), total);
  }
  if (lane == 0) *highest = most, *divisor = total;
}

// Write the outputs of `own_heads` heads from all splits of their row: `sums` (heads, all_splits, VALUE_DIM) and `stats`
// (heads, all_splits, 2) from the first split with keys on. With one split it would be the output of attend_rows.
__device__ inline void merge_splits(const float* sums, const float* stats, const row* sinks, row* out, int own_heads,
                                    int splits, int all_splits) {
  __shared__ float highest[HEADS], divisors[HEADS];
  for (int head = threadIdx.x / WARP_THREADS; head < own_heads; head += WARPS)
    merge_stats(stats + head * all_splits * 2, splits, sinks ? sinks + head : nullptr, highest + head, divisors + head);
  __syncthreads();
  for (int column = threadIdx.x; column < VALUE_DIM; column += THREADS) {
    float totals[HEADS] = {};
#pragma unroll SPLITS_TOGETHER
    for (int split = 0; split < splits; ++split)
#pragma unroll
      for (int head = 0; head < HEADS; ++head) {
        const int own = min(head, own_heads - 1), at = own * all_splits + split;
        const float sum = sums[static_cast<long long>(at) * VALUE_DIM + column];
        totals[head] = fmaf(sum, expf(stats[2 * at] - highest[own]), totals[head]);
      }
#pragma unroll
    for (int head = 0; head < HEADS; ++head)
      if (head < own_heads) narrow(totals[head] / divisors[head], out + head * VALUE_DIM + column);
  }
}

// Whether the block is the last of `total` whose sums are written; that one leaves the counter at zero.
__device__ inline bool is_last_block(int* arrived, int total) {
  __shared__ bool is_last;
  __syncthreads();  // all of the block's sums are written
  if (threadIdx.x == 0) {
    __threadfence();  // the block's sums before its arrival
    is_last = atomicAdd(arrived, 1) == total - 1;
    if (is_last) {
      __threadfence();  // the others' arrivals before their sums
      *arrived = 0;
    }
  }
  __syncthreads();
  return is_last;
}

extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS)
    attend_rows(const row* queries, const row* rotary, const float* cosines, const float* sines, const row* keys,
                const row* values, const row* sinks, const int* spans, const int* pages, float* sums, float* stats,
                int* arrived, row* out, int heads, int kv_heads, int value_stride, float scale, int window, int pairs,
                int interleaved, long long rotary_stride, long long rotary_head_stride) {
  __shared__ __align__(16) float scaled[HEADS][Keys::EIGHTS * 8], all_scores[WARPS][PAGE_ROWS][HEADS];
  __shared__ __align__(16) float partial[WARPS][Values::EIGHTS * 8], warp_stats[HEADS][WARPS][2];
  const long long token = blockIdx.z;
  const int shared = heads / kv_heads, rounds = (shared + HEADS - 1) / HEADS, splits = gridDim.y, split = blockIdx.y;
  const int kv_head = blockIdx.x / rounds, first_head = kv_head * shared + blockIdx.x % rounds * HEADS;
  const int own_heads = min(HEADS, (kv_head + 1) * shared - first_head);
  const int position = spans[2 * token];
  const int seen_from = window ? max(0, position - window + 1) : 0;
  const int first_split = seen_from / SPLIT, own_splits = position / SPLIT - first_split + 1;
  if (split < first_split || split >= first_split + own_splits) return;
#pragma unroll 1
  for (int i = threadIdx.x; i < HEADS * Keys::EIGHTS * 8; i += THREADS) {
    const int head = i / (Keys::EIGHTS * 8), column = i % (Keys::EIGHTS * 8), number = first_head + head;
    const bool exists = head < own_heads && column < HEAD_DIM;
    float query = 0.0f;
    if (HEAD_DIM > VALUE_DIM && rotary) {
      const row* from = rotary + token * rotary_stride + number * rotary_head_stride;
      if (exists && column < VALUE_DIM) query = widen(queries[(token * heads + number) * VALUE_DIM + column]);
      else if (exists)
        query = rotated_number(from, cosines + token * pairs, sines + token * pairs, column - VALUE_DIM, pairs,
                               interleaved);
    } else if (exists) {
      query = widen(queries[(token * heads + number) * HEAD_DIM + column]);
    }
    scaled[head][column] = query * scale;
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
      if (own_splits > 1) sums[(vector * splits + split) * VALUE_DIM + column] = total;
      else narrow(output, out + vector * VALUE_DIM + column);
    }
    if (own_splits > 1 && threadIdx.x < 2)
      stats[(vector * splits + split) * 2 + threadIdx.x] = split_stats[threadIdx.x];
  }
  if (own_splits == 1 || !is_last_block(arrived + token * gridDim.x + blockIdx.x, own_splits)) return;
  const long long vector = token * heads + first_head, at = vector * splits + first_split;
  merge_splits(sums + at * VALUE_DIM, stats + at * 2, sinks ? sinks + first_head : nullptr, out + vector * VALUE_DIM,
               own_heads, own_splits, splits);
}
