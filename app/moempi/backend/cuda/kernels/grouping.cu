// Sorting the T * K choices of a layer by destination, stably.
//
//   group        order[place] = row of the choice, places[choice] = place, counts[key]      NumPy: group
//   take_turns   experts * turns + row % turns                                              NumPy: take_turns
//
// A block owns one key: its warps each count a run of the choices, then put those of the key into their places. No
// atomics: the same places in every run. Launch: group a block of 256 a key; take_turns ceil(T * K / 256) blocks of 256.
#include "rows.cuh"

const int GROUPING_WARPS = 8;

extern "C" __global__ void group(const int* experts, const int* keys, int* rows, int* places, int* counts, int choices,
                                 int slots) {
  __shared__ int before_of_warp[GROUPING_WARPS], own_of_warp[GROUPING_WARPS];
  const int key = blockIdx.x, lane = threadIdx.x % WARP_THREADS, warp = threadIdx.x / WARP_THREADS;
  const int run = (choices + GROUPING_WARPS - 1) / GROUPING_WARPS;
  const int first = min(warp * run, choices), last = min(first + run, choices);
  int lesser = 0, own = 0;
  for (int start = first; start < last; start += WARP_THREADS) {
    const int found = start + lane < last ? keys[experts[start + lane]] : 0x7fffffff;
    lesser += __popc(__ballot_sync(ALL_LANES, found < key));
    own += __popc(__ballot_sync(ALL_LANES, found == key));
  }
  if (lane == 0) before_of_warp[warp] = lesser, own_of_warp[warp] = own;
  __syncthreads();
  int place = 0, total = 0;
  for (int other = 0; other < GROUPING_WARPS; ++other) {
    place += before_of_warp[other] + (other < warp ? own_of_warp[other] : 0);
    total += own_of_warp[other];
  }
  if (threadIdx.x == 0) counts[key] = total;
  for (int start = first; start < last; start += WARP_THREADS) {
    const bool mine = start + lane < last && keys[experts[start + lane]] == key;
    const unsigned all = __ballot_sync(ALL_LANES, mine);
    if (mine) {
      const int here = place + __popc(all & ((1u << lane) - 1u));
      rows[here] = (start + lane) / slots;
      places[start + lane] = here;
    }
    place += __popc(all);
  }
}

extern "C" __global__ void take_turns(const int* experts, int* out, int choices, int slots, int turns) {
  const int choice = blockIdx.x * blockDim.x + threadIdx.x;
  if (choice < choices) out[choice] = experts[choice] * turns + choice / slots % turns;
}
