// Log-probabilities of float logits (N, V).
//
//   score   per row: the token (its target, or the most likely token if the target is negative), its log-probability,
//           and the `top` most likely tokens with theirs, lowest token first on a tie    NumPy: score, greedy sample
//
//   sum_exponentials   per row and block of `tokens` logits the largest, m, and the sum of exp(logit - m)
//                                                                                             NumPy: _exponential_sums
//   likeliest   per row: the logit of a place, and the `top` likeliest tokens with their logits, as in `score`
//                                                                                                        NumPy: scan
//   count_above, take_above   per row: how many logits are above its `least`, and these tokens, ascending, with their
//                             logits, the first at the row's place in `firsts`                    NumPy: tokens_above
//
// NaN is as likely as minus infinity. Shapes: targets, places, tokens and logprobs (N), top_tokens, top_logprobs and
// top_logits (N, top), highest and sums (N, blocks), least, firsts and counts (N), the tokens and logits above (S).
// Launch: one block of 1,024 per row; sum_exponentials one of 256 per row and block of tokens.
#include "rows.cuh"

struct Candidate {
  float logit;
  int token;
};

// Whether a precedes b in order of falling logit, then rising token.
__device__ inline bool is_before(Candidate a, Candidate b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

__device__ inline Candidate warp_first(Candidate own) {
  for (int apart = WARP_THREADS / 2; apart; apart /= 2) {
    Candidate other;
    other.logit = __shfl_xor_sync(FULL_WARP, own.logit, apart);
    other.token = __shfl_xor_sync(FULL_WARP, own.token, apart);
    if (is_before(other, own)) own = other;
  }
  return own;
}

// The first token after `last` in this order; every thread gets it.
__device__ inline Candidate next_likeliest(const float* logits, int vocabulary, Candidate last) {
  __shared__ Candidate of_warp[WARP_THREADS];
  Candidate own = {-infinity(), 0x7fffffff};
  for (int token = threadIdx.x; token < vocabulary; token += blockDim.x) {
    const float logit = logits[token];
    const Candidate found = {logit != logit ? -infinity() : logit, token};
    if (is_before(last, found) && is_before(found, own)) own = found;
  }
  own = warp_first(own);
  __syncthreads();
  if (threadIdx.x % WARP_THREADS == 0) of_warp[threadIdx.x / WARP_THREADS] = own;
  __syncthreads();
  return warp_first(of_warp[min(threadIdx.x % WARP_THREADS, blockDim.x / WARP_THREADS - 1)]);
}

extern "C" __global__ void score(const float* logits, const int* targets, int* tokens, float* logprobs, int* top_tokens,
                                 float* top_logprobs, int vocabulary, int top) {
  const float* row_logits = logits + static_cast<long long>(blockIdx.x) * vocabulary;
  float sum = 0.0f, highest = -infinity();
  for (int token = threadIdx.x; token < vocabulary; token += blockDim.x) highest = fmaxf(highest, row_logits[token]);
  highest = block_max(highest);
  for (int token = threadIdx.x; token < vocabulary; token += blockDim.x) sum += expf(row_logits[token] - highest);
  const float log_sum = logf(block_sum(sum));
  Candidate likely = {infinity(), -1};
  const int target = targets[blockIdx.x], rounds = target < 0 ? max(top, 1) : top;
  for (int nth = 0; nth < rounds; ++nth) {
    likely = next_likeliest(row_logits, vocabulary, likely);
    if (threadIdx.x == 0 && nth < top) {
      top_tokens[blockIdx.x * top + nth] = likely.token;
      top_logprobs[blockIdx.x * top + nth] = row_logits[likely.token] - highest - log_sum;
    }
    if (threadIdx.x == 0 && nth == 0 && target < 0)
      tokens[blockIdx.x] = log_sum != log_sum ? 0 : likely.token;  // as sample_tokens
  }
  if (threadIdx.x == 0) {
    if (target >= 0) tokens[blockIdx.x] = target;
    logprobs[blockIdx.x] = row_logits[tokens[blockIdx.x]] - highest - log_sum;
  }
}

extern "C" __global__ void sum_exponentials(const float* logits, float* highest, float* sums, int width, int tokens) {
  const int first = blockIdx.y * tokens, count = min(tokens, width - first);
  const float* own = logits + static_cast<long long>(blockIdx.x) * width + first;
  float most = -infinity(), sum = 0.0f;
  for (int token = threadIdx.x; token < count; token += blockDim.x) most = fmaxf(most, own[token]);
  most = block_max(most);
  const float shift = most == -infinity() ? 0.0f : most;
  for (int token = threadIdx.x; token < count; token += blockDim.x) sum += expf(own[token] - shift);
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    highest[blockIdx.x * gridDim.y + blockIdx.y] = most;
    sums[blockIdx.x * gridDim.y + blockIdx.y] = sum;
  }
}

extern "C" __global__ void likeliest(const float* logits, const int* places, float* place_logits, int* top_tokens,
                                     float* top_logits, int width, int top) {
  const float* row_logits = logits + static_cast<long long>(blockIdx.x) * width;
  Candidate likely = {infinity(), -1};
  for (int nth = 0; nth < top; ++nth) {
    likely = next_likeliest(row_logits, width, likely);
    if (threadIdx.x == 0) {
      top_tokens[blockIdx.x * top + nth] = likely.token;
      top_logits[blockIdx.x * top + nth] = row_logits[likely.token];
    }
  }
  if (threadIdx.x == 0) place_logits[blockIdx.x] = row_logits[places[blockIdx.x]];
}

extern "C" __global__ void count_above(const float* logits, const float* least, int* counts, int width) {
  __shared__ int found;
  const float* own = logits + static_cast<long long>(blockIdx.x) * width;
  if (threadIdx.x == 0) found = 0;
  int count = 0;
  for (int token = threadIdx.x; token < width; token += blockDim.x) count += own[token] > least[blockIdx.x];
  __syncthreads();
  if (count) atomicAdd(&found, count);
  __syncthreads();
  if (threadIdx.x == 0) counts[blockIdx.x] = found;
}

extern "C" __global__ void take_above(const float* logits, const float* least, const int* firsts, int* tokens,
                                      float* found, int width) {
  __shared__ int of_warp[WARP_THREADS];
  const int lane = threadIdx.x % WARP_THREADS, warp = threadIdx.x / WARP_THREADS, warps = blockDim.x / WARP_THREADS;
  const float* own = logits + static_cast<long long>(blockIdx.x) * width;
  int first = firsts[blockIdx.x];  // the place of the first token of this round
  for (int start = 0; start < width; start += blockDim.x) {
    const int token = start + threadIdx.x;
    const bool is_above = token < width && own[token] > least[blockIdx.x];
    const unsigned all = __ballot_sync(FULL_WARP, is_above);
    __syncthreads();  // the counts of the round before have been read
    if (lane == 0) of_warp[warp] = __popc(all);
    __syncthreads();
    int place = first + __popc(all & ((1u << lane) - 1u));
    for (int other = 0; other < warps; ++other) {
      if (other < warp) place += of_warp[other];
      first += of_warp[other];
    }
    if (is_above) tokens[place] = token, found[place] = own[token];
  }
}
