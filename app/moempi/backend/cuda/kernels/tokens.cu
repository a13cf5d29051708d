// Log-probabilities of float logits (N, V).
//
//   score   per row: the token (its target, or the most likely token if the target is negative), its log-probability,
//           and the `top` most likely tokens with theirs, lowest token first on a tie    NumPy: score, greedy sample
//
//   sum_exponentials   per row and block of `tokens` logits the largest, m, and the sum of exp(logit - m)
//                                                                                             NumPy: _exponential_sums
//   likeliest   per row: the logit of a place, and the `top` likeliest tokens with their logits, as in `score`
//                                                                                                        NumPy: scan
//
// Shapes: targets, places, tokens and logprobs (N), top_tokens, top_logprobs and top_logits (N, top), highest and sums
// (N, blocks). Launch: one block of 1,024 per row; sum_exponentials one of 256 per row and block of tokens.
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
    const Candidate found = {logits[token], token};
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
    if (likely.token >= vocabulary) likely.token = 0;  // only NaN is left
    if (threadIdx.x == 0 && nth < top) {
      top_tokens[blockIdx.x * top + nth] = likely.token;
      top_logprobs[blockIdx.x * top + nth] = likely.logit - highest - log_sum;
    }
    if (threadIdx.x == 0 && nth == 0 && target < 0) tokens[blockIdx.x] = likely.token;
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
    if (likely.token >= width) likely.token = 0;  // only NaN is left
    if (threadIdx.x == 0) {
      top_tokens[blockIdx.x * top + nth] = likely.token;
      top_logits[blockIdx.x * top + nth] = likely.logit;
    }
  }
  if (threadIdx.x == 0) place_logits[blockIdx.x] = row_logits[places[blockIdx.x]];
}
