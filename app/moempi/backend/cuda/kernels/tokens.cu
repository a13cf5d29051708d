// Log-probabilities of float logits (N, V).
//
//   score   per row: the token (its target, or the most likely token if the target is negative), its log-probability,
//           and the `top` most likely tokens with theirs, lowest token first on a tie    NumPy: score, greedy sample
//
// Shapes: targets, tokens and logprobs (N), top_tokens and top_logprobs (N, top). Launch: one block of 1,024 per row.
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
