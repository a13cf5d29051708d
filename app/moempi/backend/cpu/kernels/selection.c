/* Sparse attention (DeepSeek-V3.2, 2025): an indexer's scores, and the positions that they select.
 *
 *   scores[t, s] = sum over heads h, in order, of weights[t, h] * max(0, queries[t, h] . key of s)
 *   positions[t] = the top_k positions of the largest scores, ascending; the lowest on a tie, NaN counts as infinity
 *
 * A row's bits depend on its own query, weights and keys alone.
 *
 * NumPy twin: `NumpyBackend.select_positions`.
 */
#include "kernels.h"
#include "simd.h"
#include "threads.h"
#include <math.h>

#define PAGE 64
#define TASK_PAGES 8 /* pages of one row that a task scores */
#define TILE 4       /* heads that share the key in registers */
#define DIGITS 256   /* values of the byte by which scores are sorted at a time */

/* The scores of one row with `count` adjacent keys. */
INLINE void score_keys(const selection *s, long row, const char *keys, long count, float *scores, const int is_bfloat16) {
    const float *queries = s->queries + row * s->heads * s->dim, *weights = s->weights + row * s->heads;
    for (long k = 0; k < count; k++) {
        float score = 0;
        for (long head = 0; head < s->heads; head += TILE) {
            group sums[TILE];
            for (int i = 0; i < TILE; i++)
                sums[i] = same(0);
            for (long d = 0; d < s->dim; d += GROUP) {
                long left = s->dim - d;
                group key = load_cached(keys, k * s->dim + d, left, is_bfloat16);
                for (int i = 0; i < TILE; i++) {
                    const float *query = queries + smallest(head + i, s->heads - 1) * s->dim + d;
                    sums[i] = fused_groups(left >= GROUP ? load_group(query) : load_some(query, left), key, sums[i]);
                }
            }
            for (long i = 0; i < TILE && head + i < s->heads; i++) {
                float product = sum_of(sums[i]);
                score = fmaf(weights[head + i], product < 0 ? 0 : product, score);
            }
        }
        scores[k] = score;
    }
}

static void score_task(const void *argument, long index) {
    const selection *s = argument;
    const long tasks = (s->width + TASK_PAGES * PAGE - 1) / (TASK_PAGES * PAGE), row = index / tasks;
    long first = index % tasks * TASK_PAGES * PAGE, end = smallest(first + TASK_PAGES * PAGE, s->seen[row]);
    for (; first < end; first += PAGE) {
        long cached = (long)s->pages[s->first_pages[row] + first / PAGE] * PAGE, count = smallest(PAGE, end - first);
        const char *keys = s->keys + cached * s->dim * (s->is_bfloat16 ? 2 : 4);
        float *scores = s->scores + row * s->width + first;
        if (s->is_bfloat16)
            score_keys(s, row, keys, count, scores, 1);
        else
            score_keys(s, row, keys, count, scores, 0);
    }
}

/* Bits that are larger for a larger score, the same for both zeros. */
static uint32_t ordered(float score) {
    uint32_t bits;
    score = score != score ? INFINITY : score == 0 ? 0 : score;
    memcpy(&bits, &score, sizeof bits);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* The bits of the `*rank`-th largest of `count` scores; `*rank` becomes how many scores with these bits are needed. */
static uint32_t threshold(const float *scores, long count, long *rank) {
    uint32_t found = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        long counts[DIGITS] = {0};
        uint32_t known = shift == 24 ? 0 : UINT32_MAX << (shift + 8);
        for (long s = 0; s < count; s++) {
            uint32_t bits = ordered(scores[s]);
            counts[bits >> shift & (DIGITS - 1)] += (bits & known) == found;
        }
        uint32_t digit = DIGITS - 1;
        for (; counts[digit] < *rank; digit--)
            *rank -= counts[digit];
        found |= digit << shift;
    }
    return found;
}

static void choose_task(const void *argument, long row) {
    const selection *s = argument;
    const float *scores = s->scores + row * s->width;
    int32_t *positions = s->positions + row * s->top_k;
    long ties = s->top_k;
    uint32_t least = threshold(scores, s->seen[row], &ties);
    for (long position = 0; position < s->seen[row]; position++) {
        uint32_t bits = ordered(scores[position]);
        if (bits > least || (bits == least && ties-- > 0))
            *positions++ = (int32_t)position;
    }
}

void select_positions(const selection *s) {
    share_tasks(score_task, s, s->rows * ((s->width + TASK_PAGES * PAGE - 1) / (TASK_PAGES * PAGE)));
    share_tasks(choose_task, s, s->rows);
}
