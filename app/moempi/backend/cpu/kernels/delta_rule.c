/* The gated delta rule and state spaces: a state per sequence, brought up to date position by position.
 *
 * A row's bits depend on the rows of its sequence alone, not on the steps that they come in. NumPy twins: delta_rule.py
 * and state_space.py.
 */
#include "kernels.h"
#include "simd.h"
#include "threads.h"
#include <math.h>

#define CHANNELS 256 /* of a task of the convolution */
#define LEAST_LENGTH 1e-6f

/* Numbers of a row of the sequence, `at` rows after the first of the segment; before it they are in the tail. */
INLINE group seen_group(const convolution *c, const span *s, const float *tail, long at, long d, long left) {
    if (at >= 0)
        return load_part(c->x + (s->row + at) * c->stride + d, left);
    return s->start ? load_part(tail + (c->num_taps - 1 + at) * c->channels + d, left) : same(0);
}

static void convolve_block(const void *argument, long index) {
    const convolution *c = argument;
    const long blocks = (c->channels + CHANNELS - 1) / CHANNELS, back = c->num_taps - 1;
    const span *s = c->spans + index / blocks;
    const long first = index % blocks * CHANNELS, last = smallest(first + CHANNELS, c->channels);
    float *tail = c->tail + s->state * back * c->channels;
    for (long position = 0; position < s->length; position++)
        for (long d = first; d < last; d += GROUP) {
            group sum = c->bias ? load_part(c->bias + d, last - d) : same(0);
            for (long tap = 0; tap <= back; tap++) {
                group seen = seen_group(c, s, tail, position - back + tap, d, last - d);
                sum = fused_groups(seen, load_part(c->taps + tap * c->channels + d, last - d), sum);
            }
            EACH(i) sum.part[i] = silu(sum.part[i]);
            store_part(c->out + (s->row + position) * c->channels + d, rounded_group(sum, c->rounded), last - d);
        }
    for (long held = 0; held < back; held++) /* a row that stays comes from a later place of the tail */
        for (long d = first; d < last; d += GROUP)
            store_part(tail + held * c->channels + d,
                       seen_group(c, s, tail, s->length - back + held, d, last - d), last - d);
}

void convolve(const convolution *c) {
    share_tasks(convolve_block, c, c->num_spans * ((c->channels + CHANNELS - 1) / CHANNELS));
}

/* unit = x / sqrt(sum of squares + LEAST_LENGTH) * scale */
static void divide_by_length(const float *x, float *unit, long width, float scale) {
    group squares = same(0);
    for (long d = 0; d < width; d += GROUP) {
        group numbers = load_part(x + d, width - d);
        squares = fused_groups(numbers, numbers, squares);
    }
    group length = same(sqrtf(sum_of(squares) + LEAST_LENGTH));
    for (long d = 0; d < width; d += GROUP) {
        group numbers = load_part(x + d, width - d);
        EACH(i) numbers.part[i] = mul(quotient(numbers.part[i], length.part[i]), set1(scale));
        store_part(unit + d, numbers, width - d);
    }
}

static void unit_row(const void *argument, long row) {
    const delta_rule *r = argument;
    const float scale = 1.0f / sqrtf((float)r->key_dim);
    for (long h = 0; h < r->key_heads; h++) {
        long at = (row * r->key_heads + h) * r->key_dim;
        divide_by_length(r->queries + row * r->stride + h * r->key_dim, r->unit_queries + at, r->key_dim, scale);
        divide_by_length(r->keys + row * r->stride + h * r->key_dim, r->unit_keys + at, r->key_dim, 1);
    }
}

/* The rows of a sequence in the columns [d, d + GROUP) of a head's state, which is held in `columns` (key_dim).
 * The change of a delta rule is relative to what the key reads; that of state spaces is the value times its step.
 */
static void read_columns(const delta_rule *r, const span *s, long head, long d, group *columns) {
    const long left = r->value_dim - d, key_head = head / (r->heads / r->key_heads);
    float *state = r->memory + (s->state * r->heads + head) * r->key_dim * r->value_dim + d;
    for (long i = 0; i < r->key_dim; i++)
        columns[i] = s->start ? load_part(state + i * r->value_dim, left) : same(0);
    for (long row = s->row; row < s->row + s->length; row++) {
        const long unit = (row * r->key_heads + key_head) * r->key_dim;
        const float *key = r->unit_keys + unit, *query = r->unit_queries + unit;
        const group alpha = same(r->alpha[row * r->heads + head]), beta = same(r->beta[row * r->heads + head]);
        const group value = load_part(r->values + row * r->stride + head * r->value_dim + d, left);
        group seen = same(0), read = same(0), change = value;
        for (long i = 0; i < r->key_dim; i++) {
            EACH(v) columns[i].part[v] = mul(columns[i].part[v], alpha.part[v]);
            seen = fused_groups(columns[i], same(key[i]), seen);
        }
        EACH(v) change.part[v] = mul(r->skip ? value.part[v] : sub(value.part[v], seen.part[v]), beta.part[v]);
        for (long i = 0; i < r->key_dim; i++) {
            columns[i] = fused_groups(same(key[i]), change, columns[i]);
            read = fused_groups(columns[i], same(query[i]), read);
        }
        if (r->skip)
            read = fused_groups(same(r->skip[head]), value, read);
        store_part(r->out + (row * r->heads + head) * r->value_dim + d, rounded_group(read, r->rounded), left);
    }
    for (long i = 0; i < r->key_dim; i++)
        store_part(state + i * r->value_dim, columns[i], left);
}

static void read_head(const void *argument, long index) {
    const delta_rule *r = argument;
    group columns[r->key_dim];
    for (long d = 0; d < r->value_dim; d += GROUP)
        read_columns(r, r->spans + index / r->heads, index % r->heads, d, columns);
}

void apply_delta_rule(const delta_rule *r) {
    if (!r->skip)
        share_tasks(unit_row, r, r->rows);
    share_tasks(read_head, r, r->num_spans * r->heads);
}

static void gate_row(const void *argument, long row) {
    const gated_norm *n = argument;
    for (long at = row * n->heads * n->width; at < (row + 1) * n->heads * n->width; at += n->width) {
        group squares = same(0);
        for (long d = 0; d < n->width; d += GROUP) {
            group numbers = load_part(n->x + at + d, n->width - d);
            squares = fused_groups(numbers, numbers, squares);
        }
        group scale = same(sqrtf(sum_of(squares) / (float)n->width + n->eps));
        for (long d = 0; d < n->width; d += GROUP) {
            group numbers = load_part(n->x + at + d, n->width - d), gate = load_part(n->gate + at + d, n->width - d);
            group weight = load_part(n->weight + d, n->width - d);
            EACH(i) {
                vec normalized = mul(quotient(numbers.part[i], scale.part[i]), weight.part[i]);
                numbers.part[i] = mul(normalized, silu(gate.part[i]));
            }
            store_part(n->out + at + d, rounded_group(numbers, n->rounded), n->width - d);
        }
    }
}

void normalize_gated(const gated_norm *n) { share_tasks(gate_row, n, n->rows); }
