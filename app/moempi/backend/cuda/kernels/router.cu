// The router: the experts of each row and their weights (config.architecture.Router).
//
//   choose_experts      the K best experts by score + correction + selection_bias, lowest index on a tie, within the
//                       best groups if there are groups (DeepSeek-V2 and -V3, 2024)      NumPy: cpu.router.choose
//   choose_sparsemixer  the two most likely experts, each weighed among the experts with nearby logits (Liu et al.
//                       2023)                                                            NumPy: cpu.router.choose
//   weigh_experts       the weights of given experts                                     NumPy: cpu.router.weights_of
//
// With `round_logits` the float logits are first rounded to the precision of rows.
// Shapes: logits (T, EXPERTS), correction and selection_bias (EXPERTS), experts and weights (T, K). A warp handles one
// row; EXPERTS is a compile-time constant. Scoring: 0 softmax, 1 sigmoid, 2 softmax over the chosen.
// Launch: ceil(T / 4) blocks of 128.
#include "rows.cuh"

const int ROUTER_WARPS = 4;
enum Scoring { SOFTMAX = 0, SIGMOID = 1, SOFTMAX_CHOSEN = 2 };

struct Best {
  float score;
  int index;
};

// The largest of a warp's scores and its index, the lowest index on a tie; a warp lane reads every 32nd score.
__device__ inline Best warp_best(const float* scores, int count) {
  const int lane = threadIdx.x % WARP_THREADS;
  Best own = {-infinity(), 0x7fffffff};
  for (int index = lane; index < count; index += WARP_THREADS)
    if (scores[index] > own.score || (scores[index] == own.score && index < own.index)) own = {scores[index], index};
  for (int apart = WARP_THREADS / 2; apart; apart /= 2) {
    const float score = __shfl_xor_sync(FULL_WARP, own.score, apart);
    const int index = __shfl_xor_sync(FULL_WARP, own.index, apart);
    if (score > own.score || (score == own.score && index < own.index)) own = {score, index};
  }
  if (own.index >= count) own.index = 0;  // only NaN is left
  return own;
}

__device__ inline float logit_of(const float* logits, int expert, int round_logits) {
  return round_logits ? stored(logits[expert]) : logits[expert];
}

// Scores (EXPERTS) of one row's logits.
__device__ inline void score_row(const float* logits, float* scores, int scoring, int round_logits) {
  const int lane = threadIdx.x % WARP_THREADS;
  float highest = -infinity(), sum = 0.0f;
  for (int expert = lane; expert < EXPERTS; expert += WARP_THREADS) {
    scores[expert] = logit_of(logits, expert, round_logits);
    highest = fmaxf(highest, scores[expert]);
  }
  if (scoring == SOFTMAX) highest = warp_max(highest);
  for (int expert = lane; expert < EXPERTS; expert += WARP_THREADS) {
    float score = scores[expert];
    if (scoring == SOFTMAX) score = expf(score - highest);
    if (scoring == SIGMOID) score = 1.0f / (1.0f + expf(-score));
    scores[expert] = score;
    sum += score;
  }
  if (scoring == SOFTMAX) {
    sum = warp_sum(sum);
    for (int expert = lane; expert < EXPERTS; expert += WARP_THREADS) scores[expert] /= sum;
  }
  __syncwarp();
}

// Compute weights from the scores of the K chosen experts.
__device__ inline void weigh_row(float* chosen, float* weights, int top_k, int scoring, int renormalize, float least_sum,
                                 float scaling, int round_weights) {
  const int lane = threadIdx.x % WARP_THREADS;
  if (scoring == SOFTMAX_CHOSEN) {
    float highest = -infinity(), sum = 0.0f;
    for (int slot = 0; slot < top_k; ++slot) highest = fmaxf(highest, chosen[slot]);
    for (int slot = 0; slot < top_k; ++slot) sum += expf(chosen[slot] - highest);
    __syncwarp();
    for (int slot = lane; slot < top_k; slot += WARP_THREADS) chosen[slot] = expf(chosen[slot] - highest) / sum;
    __syncwarp();
  }
  float divisor = 1.0f;
  if (renormalize) {
    divisor = 0.0f;
    for (int slot = 0; slot < top_k; ++slot) divisor += chosen[slot];
    divisor = fmaxf(divisor, least_sum);
  }
  for (int slot = lane; slot < top_k; slot += WARP_THREADS) {
    const float weight = chosen[slot] / divisor * scaling;
    weights[slot] = round_weights ? stored(weight) : weight;
  }
}

// Exclude all but the `kept` best groups of adjacent experts; a group ranks by its best score or its two best together.
__device__ inline void keep_best_groups(float* ranked, float* groups, int num_groups, int kept, int top_of_group) {
  const int lane = threadIdx.x % WARP_THREADS, size = EXPERTS / num_groups;
  for (int group = lane; group < num_groups; group += WARP_THREADS) {
    float best = -infinity(), second = -infinity();
    for (int expert = group * size; expert < (group + 1) * size; ++expert) {
      const float score = ranked[expert];
      if (score > best) second = best, best = score;
      else second = fmaxf(second, score);
    }
    groups[group] = top_of_group == 2 && size > 1 ? best + second : best;
  }
  __syncwarp();
  unsigned long long keeps[(EXPERTS + 63) / 64] = {0};
  for (int nth = 0; nth < kept; ++nth) {
    const int group = warp_best(groups, num_groups).index;
    keeps[group / 64] |= 1ull << group % 64;
    __syncwarp();
    if (lane == 0) groups[group] = -infinity();
    __syncwarp();
  }
  for (int expert = lane; expert < EXPERTS; expert += WARP_THREADS)
    if (!(keeps[expert / size / 64] >> expert / size % 64 & 1ull)) ranked[expert] = -infinity();
  __syncwarp();
}

extern "C" __global__ void choose_experts(const float* logits, const float* correction, const float* selection_bias,
                                          int* experts, float* weights, int rows, int top_k, int scoring,
                                          int num_groups, int kept_groups, int top_of_group, int renormalize,
                                          float least_sum, float scaling, int round_logits, int round_weights) {
  __shared__ float all_scores[ROUTER_WARPS][EXPERTS], all_ranked[ROUTER_WARPS][EXPERTS];
  __shared__ float all_chosen[ROUTER_WARPS][EXPERTS];  // scores of the groups, then of the chosen experts
  const int warp = threadIdx.x / WARP_THREADS, lane = threadIdx.x % WARP_THREADS;
  const long long token = static_cast<long long>(blockIdx.x) * ROUTER_WARPS + warp;
  if (token >= rows) return;
  float *scores = all_scores[warp], *ranked = all_ranked[warp], *chosen = all_chosen[warp];
  score_row(logits + token * EXPERTS, scores, scoring, round_logits);
  for (int expert = lane; expert < EXPERTS; expert += WARP_THREADS) {
    float term = correction ? correction[expert] : 0.0f;
    if (selection_bias) term += selection_bias[expert];
    ranked[expert] = scores[expert] + term;
  }
  __syncwarp();
  if (num_groups > 1) keep_best_groups(ranked, chosen, num_groups, kept_groups, top_of_group);
  for (int slot = 0; slot < top_k; ++slot) {
    const int best = warp_best(ranked, EXPERTS).index;
    __syncwarp();
    if (lane == 0) {
      experts[token * top_k + slot] = best;
      chosen[slot] = scores[best];
      ranked[best] = __uint_as_float(0x7fc00000u);  // NaN: never chosen again
    }
    __syncwarp();
  }
  weigh_row(chosen, weights + token * top_k, top_k, scoring, renormalize, least_sum, scaling, round_weights);
}

extern "C" __global__ void weigh_experts(const float* logits, const int* experts, float* weights, int rows, int top_k,
                                         int scoring, int renormalize, float least_sum, float scaling,
                                         int round_logits, int round_weights) {
  __shared__ float all_scores[ROUTER_WARPS][EXPERTS], all_chosen[ROUTER_WARPS][EXPERTS];
  const int warp = threadIdx.x / WARP_THREADS, lane = threadIdx.x % WARP_THREADS;
  const long long token = static_cast<long long>(blockIdx.x) * ROUTER_WARPS + warp;
  if (token >= rows) return;
  score_row(logits + token * EXPERTS, all_scores[warp], scoring, round_logits);
  for (int slot = lane; slot < top_k; slot += WARP_THREADS)
    all_chosen[warp][slot] = all_scores[warp][experts[token * top_k + slot]];
  __syncwarp();
  weigh_row(all_chosen[warp], weights + token * top_k, top_k, scoring, renormalize, least_sum, scaling, round_weights);
}

// The most likely expert except `left_out`, and its weight among the experts with nearby logits.
__device__ inline Best weigh_likeliest(const float* logits, int left_out, float jitter, int round_logits) {
  const int lane = threadIdx.x % WARP_THREADS;
  Best own = {-infinity(), 0x7fffffff};
  for (int expert = lane; expert < EXPERTS; expert += WARP_THREADS) {
    const float logit = logit_of(logits, expert, round_logits);
    if (expert != left_out && (logit > own.score || own.index == 0x7fffffff)) own = {logit, expert};
  }
  for (int apart = WARP_THREADS / 2; apart; apart /= 2) {
    const float score = __shfl_xor_sync(FULL_WARP, own.score, apart);
    const int index = __shfl_xor_sync(FULL_WARP, own.index, apart);
    if (score > own.score || (score == own.score && index < own.index)) own = {score, index};
  }
  float sum = 0.0f;
  for (int expert = lane; expert < EXPERTS; expert += WARP_THREADS) {
    const float logit = logit_of(logits, expert, round_logits);
    const float far = (own.score - logit) / fmaxf(fabsf(logit), own.score);
    if (expert != left_out && !(far > 2.0f * jitter)) sum += expf(logit - own.score);
  }
  own.score = 1.0f / warp_sum(sum);
  return own;
}

extern "C" __global__ void choose_sparsemixer(const float* logits, int* experts, float* weights, int rows, float jitter,
                                              int round_logits, int round_weights) {
  const int warp = threadIdx.x / WARP_THREADS;
  const long long token = static_cast<long long>(blockIdx.x) * ROUTER_WARPS + warp;
  if (token >= rows) return;
  int left_out = -1;
  for (int slot = 0; slot < 2; ++slot) {
    const Best best = weigh_likeliest(logits + token * EXPERTS, left_out, jitter, round_logits);
    left_out = best.index;
    if (threadIdx.x % WARP_THREADS == 0) {
      experts[token * 2 + slot] = best.index;
      weights[token * 2 + slot] = round_weights ? stored(best.score) : best.score;
    }
  }
}
