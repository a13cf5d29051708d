// Stable counting sort of the T * K choices of a layer by physical expert.
//
//   count_choices   counts_before[id, block] = choices of a physical id in the run of choices of a block
//   scan_blocks     replaces these by the choices of the id in the runs of all blocks before; counts[id] = all of them
//   group           source_rows[output_row] = row of the choice, output_rows[choice] = output_row, where output_row is
//                   the sorted position of the choice; counts[id] = choices of a physical id             NumPy: group
//   pick_replicas   out = experts * period + row % period                                         NumPy: pick_replicas
//
// Shapes: experts, output_rows and out (T, K), source_rows (T * K), physical_ids by expert, counts by physical id,
// counts_before (ids, blocks). A block has an equal run of the choices, and each of its warps an equal part of the run;
// a warp sorts 32 choices at a time. IDS, a compile-time constant of at most 8,192, is at least the number of ids.
// There are no atomics, so the order is the same in every run.
// Launch: count_choices and group `blocks` blocks of 32 * WARPS threads, where WARPS = min(8, 8192 / IDS); scan_blocks
// a block per id of `blocks` threads, rounded up to whole warps, at most 1,024. With one block, group alone, with null
// counts_before. pick_replicas ceil(T * K / 256) blocks of 256.
#include "rows.cuh"

const int WARPS = IDS <= 1024 ? 8 : 8192 / IDS;
const int THREADS = WARPS * WARP_THREADS;
static_assert(WARPS > 0, "at most 8,192 physical experts in a layer");

// The choices of a warp.
struct Run {
  int first, last;
  __device__ inline explicit Run(int choices) {
    const int size = (choices + gridDim.x * WARPS - 1) / (gridDim.x * WARPS);
    first = min(choices, static_cast<int>(blockIdx.x * WARPS + threadIdx.x / WARP_THREADS) * size);
    last = min(choices, first + size);
  }
};

// Where a warp lane's id stands among the ids of its warp; -1 is no id.
struct Standing {
  int before, all;
  bool is_first;
  __device__ inline explicit Standing(int id) {
    const unsigned lane = threadIdx.x % WARP_THREADS, same = __match_any_sync(FULL_WARP, id);
    before = __popc(same & ((1u << lane) - 1u)), all = __popc(same);
    is_first = before == 0 && id >= 0;
  }
};

// own_counts[id] = choices of the id in the warp's run.
__device__ inline void count_run(const int* experts, const int* physical_ids, int* own_counts, Run run) {
  const int lane = threadIdx.x % WARP_THREADS;
  for (int id = lane; id < IDS; id += WARP_THREADS) own_counts[id] = 0;
  __syncwarp();
  for (int start = run.first; start < run.last; start += WARP_THREADS) {
    const int id = start + lane < run.last ? physical_ids[experts[start + lane]] : -1;
    const Standing standing(id);
    if (standing.is_first) own_counts[id] += standing.all;
    __syncwarp();
  }
}

// The sum of `value` over the threads of the block before this one; all threads must call it.
__device__ inline int sum_before(int value) {
  __shared__ int of_warp[WARP_THREADS];
  const int lane = threadIdx.x % WARP_THREADS, warp = threadIdx.x / WARP_THREADS;
  int sum = value;
  for (int apart = 1; apart < WARP_THREADS; apart *= 2) {
    const int other = __shfl_sync(FULL_WARP, sum, max(0, lane - apart));
    if (lane >= apart) sum += other;
  }
  __syncthreads();  // the result of an earlier call has been read
  if (lane == WARP_THREADS - 1) of_warp[warp] = sum;
  __syncthreads();
  for (int other = 0; other < warp; ++other) sum += of_warp[other];
  return sum - value;
}

extern "C" __global__ void count_choices(const int* experts, const int* physical_ids, int* counts_before, int choices,
                                         int num_ids) {
  __shared__ int warp_counts[WARPS][IDS];
  count_run(experts, physical_ids, warp_counts[threadIdx.x / WARP_THREADS], Run(choices));
  __syncthreads();
  for (int id = threadIdx.x; id < num_ids; id += THREADS) {
    int count = 0;
    for (int warp = 0; warp < WARPS; ++warp) count += warp_counts[warp][id];
    counts_before[static_cast<long long>(id) * gridDim.x + blockIdx.x] = count;
  }
}

extern "C" __global__ void scan_blocks(int* counts_before, int* counts, int blocks) {
  int* own = counts_before + static_cast<long long>(blockIdx.x) * blocks;
  const int count = static_cast<int>(threadIdx.x) < blocks ? own[threadIdx.x] : 0;
  const int before = sum_before(count);
  if (static_cast<int>(threadIdx.x) < blocks) own[threadIdx.x] = before;
  if (static_cast<int>(threadIdx.x) == blocks - 1) counts[blockIdx.x] = before + count;
}

extern "C" __global__ void group(const int* experts, const int* physical_ids, const int* counts_before,
                                 int* source_rows, int* output_rows, int* counts, int choices, int slots, int num_ids) {
  __shared__ int next_rows[WARPS][IDS];  // first the warps' counts
  const int lane = threadIdx.x % WARP_THREADS, warp = threadIdx.x / WARP_THREADS;
  const Run run(choices);
  count_run(experts, physical_ids, next_rows[warp], run);
  __syncthreads();
  const int share = (num_ids + THREADS - 1) / THREADS;  // ids of a thread
  const int first_id = min(num_ids, static_cast<int>(threadIdx.x) * share), last_id = min(num_ids, first_id + share);
  int own_choices = 0;
  for (int id = first_id; id < last_id; ++id) {
    int count = 0;
    for (int other = 0; other < WARPS; ++other) count += next_rows[other][id];
    if (!counts_before) counts[id] = count;
    own_choices += counts_before ? counts[id] : count;
  }
  int id_row = sum_before(own_choices);
  for (int id = first_id; id < last_id; ++id) {
    int row = id_row + (counts_before ? counts_before[static_cast<long long>(id) * gridDim.x + blockIdx.x] : 0);
    for (int other = 0; other < WARPS; ++other) {
      const int count = next_rows[other][id];
      next_rows[other][id] = row;
      row += count;
    }
    id_row = counts_before ? id_row + counts[id] : row;
  }
  __syncthreads();
  for (int start = run.first; start < run.last; start += WARP_THREADS) {
    const int choice = start + lane, id = choice < run.last ? physical_ids[experts[choice]] : -1;
    const Standing standing(id);
    const int output_row = id < 0 ? 0 : next_rows[warp][id] + standing.before;
    __syncwarp();
    if (standing.is_first) next_rows[warp][id] += standing.all;
    __syncwarp();
    if (id < 0) continue;
    source_rows[output_row] = choice / slots;
    output_rows[choice] = output_row;
  }
}

extern "C" __global__ void pick_replicas(const int* experts, int* out, int choices, int slots, int period) {
  const int choice = blockIdx.x * blockDim.x + threadIdx.x;
  if (choice < choices) out[choice] = experts[choice] * period + choice / slots % period;
}
