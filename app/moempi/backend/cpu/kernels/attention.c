/* Causal attention of new rows over each sequence's pages of a cache.
 *
 *   out[t, h] = round( sum over keys of softmax(queries[t, h] . key) * value )
 *
 * A query sees the keys up to its own position, with a window the last `window` of them. Its pages are taken in
 * ascending order, with the largest score so far (Milakov and Gimelshein 2018): its bits depend on its own position,
 * keys and values alone. A sink is the score of one more key, whose value is zero.
 *
 * The cache holds bfloat16 or float32 numbers, [page][position of the page][key-value head][dim]. Queries are scaled.
 *
 * NumPy twin: `NumpyBackend.attend`.
 */
#include "kernels.h"
#include "simd.h"
#include "threads.h"
#include <math.h>

#define PAGE 64
#define TILE 4   /* queries that share the keys in registers */
#define CHUNK 64 /* queries of a task, which share a page in the first-level cache */
#define WIDE (LANES == 16 ? 4 : 1)
#define FEWEST_QUERIES 32 /* of a task that transposes the keys of a page */
#define MOST_NUMBERS 512  /* of a key and its value, where they are transposed */
#define KEY_VECS (LANES == 16 ? 1 : 2) /* vectors of transposed keys whose scores are computed together */

/* The queries of a tile: `scores` of a page, and what each has of the softmax so far. */
typedef struct {
    const float *queries[TILE];
    float *out[TILE];
    long begin[TILE], end[TILE]; /* keys of the page that a query sees */
    float scores[TILE][PAGE];
} tile;

/* A page of a key-value head: the cache's own numbers, or widened ones whose keys are (dim, PAGE). */
typedef struct {
    const char *keys, *values;
    long key_stride, value_stride;
    const float *transposed_keys; /* instead of `keys`, or NULL */
    int is_bfloat16;
} page_numbers;

/* The scores of `queries` queries, a constant after inlining, with keys [begin, end) of the page. */
INLINE void score(tile *t, const char *keys, long stride, long dim, long begin, long end, const int queries,
                  const int is_bfloat16) {
    for (long k = begin; k < end; k++) {
        group sums[TILE];
        for (int q = 0; q < queries; q++)
            sums[q] = same(0);
        for (long d = 0; d < dim; d += GROUP) {
            group key = load_cached(keys, k * stride + d, dim - d, is_bfloat16);
            for (int q = 0; q < queries; q++) {
                const float *query = t->queries[q] + d;
                sums[q] = fused_groups(dim - d >= GROUP ? load_group(query) : load_some(query, dim - d), key, sums[q]);
            }
        }
        for (int q = 0; q < queries; q++)
            t->scores[q][k] = sum_of(sums[q]);
    }
}

/* The same scores, with the same bits, for vectors of keys (dim, PAGE): the products of numbers n, n + GROUP,
 * n + 2 GROUP ... are added as in lane n of a group, and these sums in the order of sum_of. */
INLINE void score_transposed(tile *t, const float *keys, long dim, long begin, long end, const int queries) {
    static const int order[GROUP] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};
    const long together = KEY_VECS * LANES;
    for (long k = begin / together * together; k < end; k += together) {
        vec sums[5][TILE][KEY_VECS];
#pragma GCC unroll 16
        for (int n = 0; n < GROUP; n++) {
            vec lane[TILE][KEY_VECS];
            for (int q = 0; q < queries; q++)
                for (int a = 0; a < KEY_VECS; a++)
                    lane[q][a] = set1(0);
            for (long d = order[n]; d < dim; d += GROUP) {
                vec key[KEY_VECS];
                for (int a = 0; a < KEY_VECS; a++)
                    key[a] = load(keys + d * PAGE + k + a * LANES);
                for (int q = 0; q < queries; q++)
                    for (int a = 0; a < KEY_VECS; a++)
                        lane[q][a] = fused(set1(t->queries[q][d]), key[a], lane[q][a]);
            }
            int level = 0;
#pragma GCC unroll 4
            for (; n >> level & 1; level++)
                for (int q = 0; q < queries; q++)
                    for (int a = 0; a < KEY_VECS; a++)
                        lane[q][a] = add(sums[level][q][a], lane[q][a]);
            for (int q = 0; q < queries; q++)
                for (int a = 0; a < KEY_VECS; a++)
                    sums[level][q][a] = lane[q][a];
        }
        for (int q = 0; q < queries; q++)
            for (int a = 0; a < KEY_VECS; a++)
                store(t->scores[q] + k + a * LANES, sums[4][q][a]);
    }
}

/* Call a kernel whose number of queries and type of numbers are constants. */
#define WITH_CONSTANTS(kernel, queries, is_bfloat16, ...) \
    switch (queries) { \
    case 1: is_bfloat16 ? kernel(__VA_ARGS__, 1, 1) : kernel(__VA_ARGS__, 1, 0); break; \
    case 2: is_bfloat16 ? kernel(__VA_ARGS__, 2, 1) : kernel(__VA_ARGS__, 2, 0); break; \
    case 3: is_bfloat16 ? kernel(__VA_ARGS__, 3, 1) : kernel(__VA_ARGS__, 3, 0); break; \
    case 4: is_bfloat16 ? kernel(__VA_ARGS__, 4, 1) : kernel(__VA_ARGS__, 4, 0); break; \
    }

#define WITH_QUERIES(kernel, queries, ...) \
    switch (queries) { \
    case 1: kernel(__VA_ARGS__, 1); break; \
    case 2: kernel(__VA_ARGS__, 2); break; \
    case 3: kernel(__VA_ARGS__, 3); break; \
    case 4: kernel(__VA_ARGS__, 4); break; \
    }

/* The largest of `before` and the scores (PAGE,) that are numbers; a NaN among them is one of their weights too. */
INLINE float most_of(const float *scores, float before) {
    group most = same(before);
    for (long k = 0; k < PAGE; k += GROUP) {
        group some = load_group(scores + k);
        EACH(i) most.part[i] = larger(some.part[i], most.part[i]);
    }
    float found[GROUP];
    store_group(found, most);
    for (int i = 0; i < GROUP; i++)
        before = found[i] > before ? found[i] : before;
    return before;
}

/* Turn the scores of a page into weights e^(score - highest), add them to `total`, and rescale what `out` holds. */
static void weigh(tile *t, int q, float *highest, float *total, long value_dim) {
    float *scores = t->scores[q], before = *highest;
    const long begin = t->begin[q], end = t->end[q];
    for (long k = 0; k < begin; k++)
        scores[k] = -INFINITY;
    for (long k = end; k < PAGE; k++)
        scores[k] = -INFINITY;
    float most = most_of(scores, before);
    for (long k = 0; k < PAGE; k += GROUP) {
        group weights = load_group(scores + k);
        EACH(i) weights.part[i] = exponential(sub(weights.part[i], set1(most)));
        store_group(scores + k, weights);
    }
    for (long k = 0; k < begin; k++)
        scores[k] = 0;
    for (long k = end; k < PAGE; k++)
        scores[k] = 0;
    group sum = same(0);
    for (long k = 0; k < PAGE; k += GROUP) {
        group weights = load_group(scores + k);
        EACH(i) sum.part[i] = add(sum.part[i], weights.part[i]);
    }
    float factor = 1;
    if (before == -INFINITY)
        factor = 0;
    else if (before != most) {
        float factors[GROUP];
        group difference = same(before - most);
        EACH(i) difference.part[i] = exponential(difference.part[i]);
        store_group(factors, difference);
        factor = factors[0];
    }
    *total = *total * factor + sum_of(sum);
    *highest = most;
    for (long d = 0; factor != 1 && d < value_dim; d++)
        t->out[q][d] *= factor;
}

/* Add `groups` groups of the weighted values of keys [begin, end), from number d on; the last ones are constants. */
INLINE void add_groups(tile *t, int first, const char *values, long stride, long d, long width, long begin, long end,
                       const int groups, const int queries, const int is_bfloat16) {
    group sums[TILE][WIDE];
    for (int q = 0; q < queries; q++)
        for (int g = 0; g < groups; g++) {
            const float *out = t->out[first + q] + d + g * GROUP;
            sums[q][g] = width >= GROUP ? load_group(out) : load_some(out, width);
        }
    for (long k = begin; k < end; k++)
        for (int g = 0; g < groups; g++) {
            group value = load_cached(values, k * stride + d + g * GROUP, width, is_bfloat16);
            for (int q = 0; q < queries; q++)
                sums[q][g] = fused_groups(same(t->scores[first + q][k]), value, sums[q][g]);
        }
    for (int q = 0; q < queries; q++)
        for (int g = 0; g < groups; g++) {
            float *out = t->out[first + q] + d + g * GROUP;
            width >= GROUP ? store_group(out, sums[q][g]) : store_some(out, sums[q][g], width);
        }
}

INLINE void add_values(tile *t, int first, const page_numbers *p, long value_dim, long begin, long end,
                       const int queries, const int is_bfloat16) {
    long d = 0;
    for (; d + WIDE * GROUP <= value_dim; d += WIDE * GROUP)
        add_groups(t, first, p->values, p->value_stride, d, GROUP, begin, end, WIDE, queries, is_bfloat16);
    for (; d < value_dim; d += GROUP)
        add_groups(t, first, p->values, p->value_stride, d, smallest(GROUP, value_dim - d), begin, end, 1, queries,
                   is_bfloat16);
}

/* The weighted values of keys [begin, end), for `queries` queries from `first` on. */
static void add_all_values(const attention *a, tile *t, int first, int queries, const page_numbers *p, long begin,
                           long end) {
    if (begin < end)
        WITH_CONSTANTS(add_values, queries, p->is_bfloat16, t, first, p, a->value_dim, begin, end)
}

/* One page for a tile: each query adds its keys in ascending order, those that all see together. */
static void attend_page(const attention *a, tile *t, int queries, const page_numbers *p, float *highest, float *total) {
    long begin = PAGE, end = 0, shared_begin = 0, shared_end = PAGE;
    for (int q = 0; q < queries; q++) {
        begin = smallest(begin, t->begin[q]), end = largest(end, t->end[q]);
        shared_begin = largest(shared_begin, t->begin[q]), shared_end = smallest(shared_end, t->end[q]);
    }
    if (shared_begin >= shared_end)
        shared_begin = shared_end = PAGE;
    if (p->transposed_keys)
        WITH_QUERIES(score_transposed, queries, t, p->transposed_keys, a->dim, begin, end)
    else
        WITH_CONSTANTS(score, queries, p->is_bfloat16, t, p->keys, p->key_stride, a->dim, begin, end)
    for (int q = 0; q < queries; q++)
        if (t->begin[q] < t->end[q])
            weigh(t, q, highest + q, total + q, a->value_dim);
    for (int q = 0; q < queries; q++)
        add_all_values(a, t, q, 1, p, t->begin[q], smallest(shared_begin, t->end[q]));
    add_all_values(a, t, 0, queries, p, shared_begin, shared_end);
    for (int q = 0; q < queries; q++)
        add_all_values(a, t, q, 1, p, largest(shared_end, t->begin[q]), t->end[q]);
}

/* Widen the first `count` positions of a page to float32 in `memory`: keys as (dim, PAGE), values as (PAGE, value_dim). */
static void transpose_page(const attention *a, page_numbers *p, long count, float *memory) {
    float *values = memory + a->dim * PAGE;
    for (long k = 0; k < count; k++) {
        for (long d = 0; d < a->dim; d += GROUP) {
            float numbers[GROUP];
            store_group(numbers, load_cached(p->keys, k * p->key_stride + d, GROUP, p->is_bfloat16));
            for (int i = 0; i < GROUP; i++)
                memory[(d + i) * PAGE + k] = numbers[i];
        }
        for (long d = 0; d < a->value_dim; d += GROUP)
            store_group(values + k * a->value_dim + d,
                        load_cached(p->values, k * p->value_stride + d, GROUP, p->is_bfloat16));
    }
    *p = (page_numbers){.transposed_keys = memory, .values = (char *)values, .value_stride = a->value_dim};
}

/* Queries [first, first + count) of one key-value head: query i is head i % shared of the segment's row i / shared.
 *
 * With `memory` (MOST_NUMBERS, PAGE), pages are transposed into it.
 */
static void attend_chunk(const attention *a, const segment *s, long kv_head, long first, long count, float *memory) {
    const long shared = a->heads / a->kv_heads, number = a->is_bfloat16 ? 2 : 4;
    float highest[CHUNK], total[CHUNK];
    for (long i = 0; i < count; i++) {
        long head = kv_head * shared + (first + i) % shared;
        highest[i] = a->sinks ? a->sinks[head] : -INFINITY;
        total[i] = a->sinks ? 1 : 0;
        memset(a->out + ((s->row + (first + i) / shared) * a->heads + head) * a->value_dim, 0,
               sizeof(float) * (size_t)a->value_dim);
    }
    long seen_from = s->start + first / shared, seen_to = s->start + (first + count - 1) / shared + 1;
    long page = a->window ? largest(0, seen_from - a->window + 1) / PAGE : 0;
    for (; page * PAGE < seen_to; page++) {
        const long cached = a->pages[s->first_page + page] * PAGE;
        page_numbers p = {
            .keys = a->keys + (cached * a->kv_heads + kv_head) * a->dim * number,
            .values = a->values + (cached * a->kv_heads + kv_head) * a->value_stride * number,
            .key_stride = a->kv_heads * a->dim,
            .value_stride = a->kv_heads * a->value_stride,
            .is_bfloat16 = a->is_bfloat16,
        };
        if (memory) /* whole vectors of keys */
            transpose_page(a, &p, smallest(PAGE, (seen_to - page * PAGE + GROUP - 1) / GROUP * GROUP), memory);
        for (long i = 0; i < count; i += TILE) {
            tile t;
            int queries = (int)smallest(TILE, count - i);
            long seen = 0;
            for (int q = 0; q < queries; q++) {
                long index = first + i + q, position = s->start + index / shared;
                long place = (s->row + index / shared) * a->heads + kv_head * shared + index % shared;
                t.queries[q] = a->queries + place * a->dim;
                t.out[q] = a->out + place * a->value_dim;
                long from = a->window ? largest(0, position - a->window + 1) : 0;
                t.begin[q] = smallest(PAGE, largest(0, from - page * PAGE));
                t.end[q] = largest(t.begin[q], smallest(PAGE, position + 1 - page * PAGE));
                seen += t.end[q] - t.begin[q];
            }
            if (!seen)
                continue;
            attend_page(a, &t, queries, &p, highest + i, total + i);
        }
    }
    for (long i = 0; i < count; i++) {
        long head = kv_head * shared + (first + i) % shared;
        float *out = a->out + ((s->row + (first + i) / shared) * a->heads + head) * a->value_dim;
        for (long d = 0; d < a->value_dim; d += GROUP) {
            long width = smallest(GROUP, a->value_dim - d);
            group g = width == GROUP ? load_group(out + d) : load_some(out + d, width);
            EACH(v) g.part[v] = quotient(g.part[v], set1(total[i]));
            EACH(v) g.part[v] = a->rounded ? nearest_bfloat16(g.part[v]) : g.part[v];
            width == GROUP ? store_group(out + d, g) : store_some(out + d, g, width);
        }
    }
}

/* Apart, so that only these tasks have so large a stack. */
static __attribute__((noinline)) void attend_transposed(const attention *a, const segment *s, long kv_head, long first,
                                                        long count) {
    float memory[MOST_NUMBERS * PAGE];
    attend_chunk(a, s, kv_head, first, count, memory);
}

typedef struct {
    const attention *attention;
    long first;
} call;

static void attend_task(const void *argument, long index) {
    const attention *a = ((const call *)argument)->attention;
    index += ((const call *)argument)->first;
    long low = 0, high = a->num_segments; /* the segment of the task is in [low, high) */
    while (high - low > 1) {
        long middle = (low + high) / 2;
        if (a->first_tasks[middle] <= index)
            low = middle;
        else
            high = middle;
    }
    const segment *s = a->segments + low;
    index -= a->first_tasks[low];
    long first = index / a->kv_heads * CHUNK, queries = s->length * (a->heads / a->kv_heads);
    long kv_head = index % a->kv_heads, count = smallest(CHUNK, queries - first);
    const int whole_groups = a->dim % GROUP == 0 && a->value_dim % GROUP == 0;
    if (count >= FEWEST_QUERIES && whole_groups && a->dim + a->value_dim <= MOST_NUMBERS)
        attend_transposed(a, s, kv_head, first, count);
    else
        attend_chunk(a, s, kv_head, first, count, NULL);
}

long chunk_queries(void) { return CHUNK; }

/* Compute the tasks [first, last). */
void attend(const attention *a, long first, long last) {
    call of = {a, first};
    share_tasks(attend_task, &of, last - first);
}
