// Stable sort of the T * K choices of a layer by physical expert.
//
//   group           source_rows[output_row] = row of the choice, output_rows[choice] = output_row, where output_row is
//                   the sorted position of the choice; counts[id] = number of choices of a physical id    NumPy: group
//   pick_replicas   out = experts * period + row % period                                         NumPy: pick_replicas
//
// Shapes: experts, output_rows and out (T, K), source_rows (T * K), physical_ids by expert, counts by physical id. A
// block owns one physical id: each of its warps counts a run of the choices, then writes the positions of its own.
// There are no atomics, so the order is the same in every run.
// Launch: group one block of 256 per physical id; pick_replicas ceil(T * K / 256) blocks of 256.
#include "rows.cuh"

const int GROUPING_WARPS = 8;

extern "C" __global__ void group(const int* experts, const int* physical_ids, int* source_rows, int* output_rows,
                                 int* counts, int choices, int slots) {
  __shared__ int before_of_warp[GROUPING_WARPS], own_of_warp[GROUPING_WARPS];
  const int own_id = blockIdx.x, lane = threadIdx.x % WARP_THREADS, warp = threadIdx.x / WARP_THREADS;
  const int run = (choices + GROUPING_WARPS - 1) / GROUPING_WARPS;
  const int first = min(warp * run, choices), last = min(first + run, choices);
  int lesser = 0, own = 0;
  for (int start = first; start < last; start += WARP_THREADS) {
    const int found = start + lane < last ? physical_ids[experts[start + lane]] : 0x7fffffff;
    lesser += __popc(__ballot_sync(FULL_WARP, found < own_id));
    own += __popc(__ballot_sync(FULL_WARP, found == own_id));
  }
  if (lane == 0) before_of_warp[warp] = lesser, own_of_warp[warp] = own;
  __syncthreads();
  int next_row = 0, total = 0;
  for (int other = 0; other < GROUPING_WARPS; ++other) {
    next_row += before_of_warp[other] + (other < warp ? own_of_warp[other] : 0);
    total += own_of_warp[other];
  }
  if (threadIdx.x == 0) counts[own_id] = total;
  for (int start = first; start < last; start += WARP_THREADS) {
    const bool is_own = start + lane < last && physical_ids[experts[start + lane]] == own_id;
    const unsigned all = __ballot_sync(FULL_WARP, is_own);
    if (is_own) {
      const int output_row = next_row + __popc(all & ((1u << lane) - 1u));
      source_rows[output_row] = (start + lane) / slots;
      output_rows[start + lane] = output_row;
    }
    next_row += __popc(all);
  }
}

extern "C" __global__ void pick_replicas(const int* experts, int* out, int choices, int slots, int period) {
  const int choice = blockIdx.x * blockDim.x + threadIdx.x;
  if (choice < choices) out[choice] = experts[choice] * period + choice / slots % period;
}
