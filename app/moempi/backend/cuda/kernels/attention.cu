// Causal attention of single rows over a paged cache, the keys of a row divided among blocks (Dao et al. 2023, split-KV).
//
//   attend_rows   for SPLIT keys of a row and a key-value head: sums of exp(score - highest) * value, of exp(score -
//                 highest), and the highest score, for up to HEADS of the query heads that share it
//   merge_splits  out = all splits' sums, brought to one highest score, divided; `sinks` take part in the divisor alone
//
// NumPy: attend. The memory moved is that of the keys and values, once; a row's bits do not depend on its batch. Any
// HEAD_DIM and VALUE_DIM up to 1,024, constants of the compilation like HEADS.
// Launch: attend_rows (rows, key-value heads * ceil(shared / HEADS), splits) blocks of 128; merge_splits (rows, heads)
// blocks of 128.
#include "paging.cuh"

const int THREADS = 128, WARPS = THREADS / WARP_THREADS;
const int SPLIT = 256;  // keys of a block; as cupy_backend.SPLIT_KEYS

__device__ constexpr int power_of_two(int least) { return least <= 1 ? 1 : 2 * power_of_two((least + 1) / 2); }

const int KEY_EIGHTS = (HEAD_DIM + 7) / 8;
const int KEY_LANES = power_of_two(KEY_EIGHTS) < WARP_THREADS ? power_of_two(KEY_EIGHTS) : WARP_THREADS;
const int KEY_TURNS = (KEY_EIGHTS + KEY_LANES - 1) / KEY_LANES;
const int VALUE_LANES = power_of_two((VALUE_DIM + 7) / 8);
const int VALUE_ROWS = THREADS / VALUE_LANES;

// Scores of the keys [first, last) with HEADS queries, into scores[head][key - first].
__device__ inline void score_keys(const row* keys, const int* pages, float (*queries)[KEY_EIGHTS * 8], float (*scores)[SPLIT],
                                  int first, int last, int kv_head, int kv_heads) {
  const int warp = threadIdx.x / WARP_THREADS, lane = threadIdx.x % WARP_THREADS;
  const int own_key = lane / KEY_LANES, own_eight = lane % KEY_LANES, together = WARP_THREADS / KEY_LANES;
  for (int start = first + warp * together; start < last; start += WARPS * together) {
    const int key = start + own_key;
    float sums[HEADS] = {};
    if (key < last) {
      const row* from = keys + (cache_row(pages, key) * kv_heads + kv_head) * HEAD_DIM;
      for (int turn = 0; turn < KEY_TURNS; ++turn) {
        const int column = (turn * KEY_LANES + own_eight) * 8;
        if (column >= HEAD_DIM) break;
        float numbers[8];
        load8(from + column, HEAD_DIM - column, numbers);
        for (int head = 0; head < HEADS; ++head)
          for (int i = 0; i < 8; ++i) sums[head] += queries[head][column + i] * numbers[i];
      }
    }
    for (int head = 0; head < HEADS; ++head) {
      for (int apart = KEY_LANES / 2; apart; apart /= 2) sums[head] += __shfl_xor_sync(ALL_LANES, sums[head], apart);
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
  for (int place = threadIdx.x; place < HEADS * KEY_EIGHTS * 8; place += THREADS) {
    const int head = place / (KEY_EIGHTS * 8), column = place % (KEY_EIGHTS * 8);
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
  const int column = threadIdx.x % VALUE_LANES * 8, own_row = threadIdx.x / VALUE_LANES;
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
  for (int place = threadIdx.x; place < own_heads * VALUE_DIM; place += THREADS) {
    const int head = place / VALUE_DIM, at = place % VALUE_DIM;
    float total = 0.0f;
    for (int run = 0; run < VALUE_ROWS; ++run) total += partial[head][run * VALUE_LANES + at / 8][at % 8];
    sums[((token * heads + first_head + head) * splits + blockIdx.z) * VALUE_DIM + at] = total;
  }
}

extern "C" __global__ void merge_splits(const float* sums, const float* stats, const row* sinks, row* out, int splits) {
  const int heads = gridDim.y, head = blockIdx.y;
  const long long vector = static_cast<long long>(blockIdx.x) * heads + head;
  const float* of_splits = stats + vector * splits * 2;
  float highest = sinks ? widen(sinks[head]) : -infinity();
  for (int split = 0; split < splits; ++split) highest = fmaxf(highest, of_splits[2 * split]);
  float divisor = sinks ? expf(widen(sinks[head]) - highest) : 0.0f;
  for (int split = 0; split < splits; ++split) divisor += of_splits[2 * split + 1] * expf(of_splits[2 * split] - highest);
  for (int column = threadIdx.x; column < VALUE_DIM; column += THREADS) {
    float total = 0.0f;
    for (int split = 0; split < splits; ++split)
      if (of_splits[2 * split + 1] > 0.0f)
        total += sums[(vector * splits + split) * VALUE_DIM + column] * expf(of_splits[2 * split] - highest);
    narrow(total / divisor, out + vector * VALUE_DIM + column);
  }
}
