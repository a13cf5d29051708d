// Causal attention of single rows over a paged cache; the keys of a row are divided among blocks (Dao et al. 2023,
// split-KV).
//
//   attend_rows   per row, key-value head and split of SPLIT keys, for up to HEADS of the query heads that share the
//                 key-value head: sum of exp(score - highest) * value, sum of exp(score - highest), and highest score
//   merge_splits  out = sum of the splits' sums, rescaled to one highest score, over the divisor; `sinks` add to the
//                 divisor only
//
// Shapes: queries (T, H, HEAD_DIM), out (T, H, VALUE_DIM), spans (T, 2) as in kv_cache.cu, sums (T, H, splits,
// VALUE_DIM), stats (T, H, splits, 2) with the highest score first. HEAD_DIM and VALUE_DIM, at most 1,024, and HEADS
// are compile-time constants. Keys and values are read once. A row's bits do not depend on its batch.
// Launch: attend_rows (T, key-value heads * ceil(shared / HEADS), splits) blocks of 128; merge_splits (T, H) blocks of
// 128. NumPy twin: attend.
#include "paging.cuh"

const int THREADS = 128, WARPS = THREADS / WARP_THREADS;
const int SPLIT = 256;  // keys per block; equals SPLIT_KEYS of cuda/backend.py

__device__ constexpr int power_of_two(int least) { return least <= 1 ? 1 : 2 * power_of_two((least + 1) / 2); }

const int KEY_EIGHTS = (HEAD_DIM + 7) / 8;
const int KEY_THREADS = power_of_two(KEY_EIGHTS) < WARP_THREADS ? power_of_two(KEY_EIGHTS) : WARP_THREADS;
const int KEY_STEPS = (KEY_EIGHTS + KEY_THREADS - 1) / KEY_THREADS;
const int VALUE_THREADS = power_of_two((VALUE_DIM + 7) / 8);
const int VALUE_ROWS = THREADS / VALUE_THREADS;

// Scores of the keys [first, last) with HEADS queries, into scores[head][key - first].
__device__ inline void score_keys(const row* keys, const int* pages, float (*queries)[KEY_EIGHTS * 8],
                                  float (*scores)[SPLIT], int first, int last, int kv_head, int kv_heads) {
  const int warp = threadIdx.x / WARP_THREADS, lane = threadIdx.x % WARP_THREADS;
  const int own_key = lane / KEY_THREADS, own_eight = lane % KEY_THREADS, together = WARP_THREADS / KEY_THREADS;
  for (int start = first + warp * together; start < last; start += WARPS * together) {
    const int key = start + own_key;
    float sums[HEADS] = {};
    if (key < last) {
      const row* from = keys + (cache_row(pages, key) * kv_heads + kv_head) * HEAD_DIM;
      for (int step = 0; step < KEY_STEPS; ++step) {
        const int column = (step * KEY_THREADS + own_eight) * 8;
        if (column >= HEAD_DIM) break;
        float numbers[8];
        load8(from + column, HEAD_DIM - column, numbers);
        for (int head = 0; head < HEADS; ++head)
          for (int i = 0; i < 8; ++i) sums[head] += queries[head][column + i] * numbers[i];
      }
    }
    for (int head = 0; head < HEADS; ++head) {
      for (int apart = KEY_THREADS / 2; apart; apart /= 2) sums[head] += __shfl_xor_sync(FULL_WARP, sums[head], apart);
      if (own_eight == 0 && key < last) scores[head][key - first] = sums[head];
    }
  }
}

extern "C" __global__ void attend_rows(const row* queries, const row* keys, const row* values, const int* spans,
                                       const int* pages, float* sums, float* stats, int heads, int kv_heads,
                                       int value_stride, float scale, int window) {
  __shared__ float scaled[HEADS][KEY_EIGHTS * 8], scores[HEADS][SPLIT], partial[HEADS][THREADS][8];
  const long long token = blockIdx.x;
  const int shared = heads / kv_heads, rounds = (shared + HEADS - 1) / HEADS, splits = gridDim.z;
  const int kv_head = blockIdx.y / rounds, first_head = kv_head * shared + blockIdx.y % rounds * HEADS;
  const int own_heads = min(HEADS, (kv_head + 1) * shared - first_head);
  const int position = spans[2 * token];
  pages += spans[2 * token + 1];
  const int seen_from = window ? max(0, position - window + 1) : 0;
  const int first = max(seen_from, static_cast<int>(blockIdx.z) * SPLIT);
  const int last = min(position + 1, static_cast<int>(blockIdx.z + 1) * SPLIT);
  if (first >= last) {
    if (static_cast<int>(threadIdx.x) < own_heads) {
      float* stat = stats + ((token * heads + first_head + threadIdx.x) * splits + blockIdx.z) * 2;
      stat[0] = -infinity(), stat[1] = 0.0f;
    }
    return;
  }
  for (int i = threadIdx.x; i < HEADS * KEY_EIGHTS * 8; i += THREADS) {
    const int head = i / (KEY_EIGHTS * 8), column = i % (KEY_EIGHTS * 8);
    const bool exists = head < own_heads && column < HEAD_DIM;
    scaled[head][column] = exists ? widen(queries[(token * heads + first_head + head) * HEAD_DIM + column]) * scale : 0.0f;
  }
  __syncthreads();
  score_keys(keys, pages, scaled, scores, first, last, kv_head, kv_heads);
  __syncthreads();
  for (int head = threadIdx.x / WARP_THREADS; head < own_heads; head += WARPS) {
    const int lane = threadIdx.x % WARP_THREADS;
    float highest = -infinity(), total = 0.0f;
    for (int key = lane; key < last - first; key += WARP_THREADS) highest = fmaxf(highest, scores[head][key]);
    highest = warp_max(highest);
    for (int key = lane; key < last - first; key += WARP_THREADS)
      total += scores[head][key] = expf(scores[head][key] - highest);
    total = warp_sum(total);
    float* stat = stats + ((token * heads + first_head + head) * splits + blockIdx.z) * 2;
    if (lane == 0) stat[0] = highest, stat[1] = total;
  }
  __syncthreads();
  const int column = threadIdx.x % VALUE_THREADS * 8, own_row = threadIdx.x / VALUE_THREADS;
  float mixed[HEADS][8] = {};
  for (int key = first + own_row; key < last && column < VALUE_DIM; key += VALUE_ROWS) {
    float numbers[8];
    const row* from = values + (cache_row(pages, key) * kv_heads + kv_head) * value_stride + column;
    load8(from, VALUE_DIM - column, numbers);
    for (int head = 0; head < HEADS; ++head)
      for (int i = 0; i < 8; ++i) mixed[head][i] += scores[head][key - first] * numbers[i];
  }
  for (int head = 0; head < HEADS; ++head)
    for (int i = 0; i < 8; ++i) partial[head][threadIdx.x][i] = mixed[head][i];
  __syncthreads();
  for (int i = threadIdx.x; i < own_heads * VALUE_DIM; i += THREADS) {
    const int head = i / VALUE_DIM, at = i % VALUE_DIM;
    float total = 0.0f;
    for (int run = 0; run < VALUE_ROWS; ++run) total += partial[head][run * VALUE_THREADS + at / 8][at % 8];
    sums[((token * heads + first_head + head) * splits + blockIdx.z) * VALUE_DIM + at] = total;
  }
}

extern "C" __global__ void merge_splits(const float* sums, const float* stats, const row* sinks, row* out, int splits) {
  const int heads = gridDim.y, head = blockIdx.y;
  const long long vector = static_cast<long long>(blockIdx.x) * heads + head;
  const float* split_stats = stats + vector * splits * 2;
  float highest = sinks ? widen(sinks[head]) : -infinity();
  for (int split = 0; split < splits; ++split) highest = fmaxf(highest, split_stats[2 * split]);
  float divisor = sinks ? expf(widen(sinks[head]) - highest) : 0.0f;
  for (int split = 0; split < splits; ++split)
    divisor += split_stats[2 * split + 1] * expf(split_stats[2 * split] - highest);
  for (int column = threadIdx.x; column < VALUE_DIM; column += THREADS) {
    float total = 0.0f;
    for (int split = 0; split < splits; ++split)
      if (split_stats[2 * split + 1] > 0.0f)
        total += sums[(vector * splits + split) * VALUE_DIM + column] * expf(split_stats[2 * split] - highest);
    narrow(total / divisor, out + vector * VALUE_DIM + column);
  }
}
