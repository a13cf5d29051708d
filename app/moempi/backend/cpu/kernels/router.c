/* The router's rules (config.architecture.Router) on float32 logits, but SparseMixer's.
 *
 * NumPy twin: router.py, whose exponentials may differ in the last place.
 */
#include "kernels.h"
#include "simd.h"
#include "threads.h"
#include <math.h>

static void round_numbers(float *numbers, long count) {
    for (long i = 0; i < count; i += GROUP) {
        long left = count - i;
        group g = left >= GROUP ? load_group(numbers + i) : load_some(numbers + i, left);
        EACH(v) g.part[v] = nearest_bfloat16(g.part[v]);
        left >= GROUP ? store_group(numbers + i, g) : store_some(numbers + i, g, left);
    }
}

/* e^(number - most), of every number. */
static void exponentials(float *numbers, long count, float most) {
    for (long i = 0; i < count; i += GROUP) {
        long left = count - i;
        group g = left >= GROUP ? load_group(numbers + i) : load_some(numbers + i, left);
        EACH(v) g.part[v] = exponential(sub(g.part[v], set1(most)));
        left >= GROUP ? store_group(numbers + i, g) : store_some(numbers + i, g, left);
    }
}

static void softmax(float *numbers, long count) {
    float most = -INFINITY, sum = 0;
    for (long i = 0; i < count; i++)
        most = numbers[i] > most ? numbers[i] : most;
    exponentials(numbers, count, most);
    for (long i = 0; i < count; i++)
        sum += numbers[i];
    for (long i = 0; i < count; i++)
        numbers[i] /= sum;
}

static void sigmoid(float *numbers, long count) {
    for (long i = 0; i < count; i++)
        numbers[i] = -numbers[i];
    exponentials(numbers, count, 0);
    for (long i = 0; i < count; i++)
        numbers[i] = 1 / (1 + numbers[i]);
}

/* Take the largest number of those that are not taken, the first of equal ones; NaN is less than any. */
static long take_largest(const float *numbers, float *taken, long count) {
    long best = -1;
    for (long i = 0; i < count; i++)
        if (!taken[i] && (best < 0 || numbers[i] > numbers[best] || numbers[best] != numbers[best]))
            if (best < 0 || numbers[i] == numbers[i])
                best = i;
    taken[best] = 1;
    return best;
}

/* Set the scores outside the best groups of adjacent experts to -infinity; `taken` is scratch memory. */
static void keep_best_groups(const choice *c, float *ranked, float *taken) {
    long size = c->num / c->num_groups;
    float *best = taken + c->num; /* of each group */
    memset(taken, 0, sizeof(float) * (size_t)c->num);
    for (long g = 0; g < c->num_groups; g++) {
        best[g] = 0;
        for (long n = 0; n < c->scores_of_group; n++)
            best[g] += ranked[g * size + take_largest(ranked + g * size, taken + g * size, size)];
    }
    memset(taken, 0, sizeof(float) * (size_t)c->num_groups);
    for (long n = 0; n < c->kept_groups; n++)
        take_largest(best, taken, c->num_groups);
    for (long i = 0; i < c->num; i++)
        if (!taken[i / size])
            ranked[i] = -INFINITY;
}

static void weigh_row(const choice *c, const float *scores, const int32_t *experts, float *weights) {
    float sum = 0;
    for (long k = 0; k < c->top_k; k++)
        weights[k] = scores[experts[k]];
    if (c->scoring == SOFTMAX_CHOSEN)
        softmax(weights, c->top_k);
    for (long k = 0; k < c->top_k; k++)
        sum += weights[k];
    for (long k = 0; k < c->top_k; k++) {
        float weight = c->renormalize ? weights[k] / (sum > c->least_sum ? sum : c->least_sum) : weights[k];
        weights[k] = weight * c->scaling;
    }
    if (c->rounded)
        round_numbers(weights, c->top_k);
}

static void choose_row(const void *argument, long row) {
    const choice *c = argument;
    float *scores = c->scores + row * 4 * c->num, *ranked = scores + c->num, *taken = ranked + c->num;
    int32_t *experts = c->experts + row * c->top_k;
    for (long i = 0; i < c->num; i++)
        scores[i] = c->logits[row * c->num + i];
    if (c->rounds_logits)
        round_numbers(scores, c->num);
    if (c->scoring == SOFTMAX)
        softmax(scores, c->num);
    if (c->scoring == SIGMOID)
        sigmoid(scores, c->num);
    for (long i = 0; i < c->num; i++)
        ranked[i] = c->correction ? scores[i] + c->correction[i] : scores[i];
    if (c->num_groups > 1)
        keep_best_groups(c, ranked, taken);
    memset(taken, 0, sizeof(float) * (size_t)c->num);
    for (long k = 0; k < c->top_k; k++)
        experts[k] = (int32_t)take_largest(ranked, taken, c->num);
    weigh_row(c, scores, experts, c->weights + row * c->top_k);
}

void choose_experts(const choice *c) { share_tasks(choose_row, c, c->rows); }
