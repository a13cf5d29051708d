// Rows selected by an index, and weighted sums of experts' outputs.
//
//   take_rows   out[i] = rows[index[i]], or rows[i] without an index            NumPy: embed, take_rows, pack, unpack
//   take_rows_over_bus   the same, where `rows` or `out` is in pinned host memory
//   pack_choices   output_rows and counts of grouping.cu, and out[output_rows[t, k]] = rows[t], in one, for at most
//               MOST_CHOICES choices: a block computes the sorted position of one choice, and copies its row there;
//               choices of tokens whose span is none are last, neither copied nor counted
//                                                                               NumPy: group_and_pack
//   combine     out[t] = sum over k, in order, of weights[t, k] * buffer[output_rows[t, k]]; then `first` and
//               `second`, if they are not null, are added; each sum is rounded    NumPy: combine
//
// Shapes: out, first and second (n, D), index (n), output_rows and weights (n, K). Rows in pinned host memory cross the
// bus once. Of pack_choices as in grouping.cu, with out (T * K, D), and spans (T, 2) as in kv_cache.cu or null.
// Launch: take_rows (n, segments of a row) blocks of SEGMENT_THREADS, take_rows_over_bus fewer than n, pack_choices as
// many as take_rows; combine (n, ceil(D / 1024)) blocks of 128, eight numbers per thread.
#include "combination.cuh"

extern "C" __global__ void take_rows(const row* rows, const int* index, row* out, int width) {
  const long long from = index ? index[blockIdx.x] : static_cast<long long>(blockIdx.x);
  copy_segment(rows + from * width, out + static_cast<long long>(blockIdx.x) * width, blockIdx.y, width);
}

extern "C" __global__ void take_rows_over_bus(const row* rows, const int* index, row* out, int count, int width) {
  for (long long to = blockIdx.x; to < count; to += gridDim.x) {
    const long long from = index ? index[to] : to;
    copy_segment(rows + from * width, out + to * width, blockIdx.y, width);
  }
}

const int MOST_CHOICES = 2048;  // equals MOST_CHOICES of cuda/packing.py
const int PACK_WARPS = SEGMENT_THREADS / WARP_THREADS;

extern "C" __global__ void pack_choices(const row* rows, const int* experts, const int* physical_ids,
                                        const int* spans, row* out, int* output_rows, int* counts, int choices,
                                        int slots, int num_ids, int width) {
  __shared__ int ids[MOST_CHOICES];
  for (int other = threadIdx.x; other < choices; other += SEGMENT_THREADS)
    ids[other] = spans && spans[2 * (other / slots)] < 0 ? num_ids : physical_ids[experts[other]];
  __syncthreads();  // the ids are read
  const int choice = blockIdx.x, id = ids[choice], from = choice / slots;
  int before = 0;
  for (int other = threadIdx.x; other < choices; other += SEGMENT_THREADS)
    before += ids[other] < id || (ids[other] == id && other < choice);
  const int to = static_cast<int>(block_sum(static_cast<float>(before)));  // exact: at most MOST_CHOICES
  if (id < num_ids)
    copy_segment(rows + static_cast<long long>(from) * width, out + static_cast<long long>(to) * width, blockIdx.y, width);
  if (blockIdx.y > 0) return;
  if (threadIdx.x == 0) output_rows[choice] = to;
  // A warp counts the choices of an id.
  const int warp = threadIdx.x / WARP_THREADS, lane = threadIdx.x % WARP_THREADS;
  for (int own = blockIdx.x * PACK_WARPS + warp; own < num_ids; own += gridDim.x * PACK_WARPS) {
    int count = 0;
    for (int other = lane; other < choices; other += WARP_THREADS) count += ids[other] == own;
    count = static_cast<int>(warp_sum(static_cast<float>(count)));
    if (lane == 0) counts[own] = count;
  }
}

extern "C" __global__ void combine(const row* buffer, const int* output_rows, const float* weights, const row* first,
                                   const row* second, row* out, int slots, int width) {
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
  float total[8];
  combine_eight(total, {buffer, output_rows, weights, first, second, slots, width}, blockIdx.x, column);
  if (column < width) store8(out + static_cast<long long>(blockIdx.x) * width + column, width - column, total);
}
