/* Norms, rotations and elementwise functions of rows of float32 numbers; `rounded` results are bfloat16 values.
 *
 * Every row is computed alone, so its bits do not depend on other rows. NumPy twins: the verbs of `NumpyBackend`.
 */
#include "kernels.h"
#include "simd.h"
#include "threads.h"
#include <math.h>

#define TASK_NUMBERS (1L << 14)

/* out = x / sqrt(mean(x^2) + eps) * weight; `out` may be `x`. */
static void normalize(const float *x, const float *weight, float *out, long width, float eps, int quotient_rounded,
                      int rounded) {
    group squares = same(0);
    for (long d = 0; d < width; d += GROUP) {
        group numbers = load_part(x + d, width - d);
        squares = fused_groups(numbers, numbers, squares);
    }
    group scale = same(sqrtf(sum_of(squares) / (float)width + eps));
    for (long d = 0; d < width; d += GROUP) {
        group numbers = load_part(x + d, width - d), weights = load_part(weight + d, width - d);
        EACH(i) numbers.part[i] = quotient(numbers.part[i], scale.part[i]);
        numbers = rounded_group(numbers, quotient_rounded);
        EACH(i) numbers.part[i] = mul(numbers.part[i], weights.part[i]);
        store_part(out + d, rounded_group(numbers, rounded), width - d);
    }
}

static void add_row(const float *x, const float *y, float *sum, long width, int rounded) {
    for (long d = 0; d < width; d += GROUP) {
        group a = load_part(x + d, width - d), b = load_part(y + d, width - d);
        EACH(i) a.part[i] = add(a.part[i], b.part[i]);
        store_part(sum + d, rounded_group(a, rounded), width - d);
    }
}

static void normalize_row(const void *argument, long row) {
    const norm *n = argument;
    const float *x = n->x + row * n->stride;
    if (n->y) {
        add_row(x, n->y + row * n->width, n->sum + row * n->width, n->width, n->rounded);
        x = n->sum + row * n->width;
    }
    for (long h = 0; h < n->heads; h++)
        normalize(x + h * n->width, n->weight, n->out + (row * n->heads + h) * n->width, n->width, n->eps,
                  n->quotient_rounded, n->rounded);
}

static void activate_row(const void *argument, long row) {
    const activation *a = argument;
    const float *gates = a->gate_up + 2 * row * a->width, *ups = gates + a->width;
    for (long d = 0; d < a->width; d += GROUP) {
        group gate = load_part(gates + d, a->width - d), up = load_part(ups + d, a->width - d);
        EACH(i) {
            vec g = gate.part[i], u = up.part[i], exponent;
            if (a->clamped) {
                g = smaller(set1(a->limit), g);
                u = add(larger(set1(-a->limit), smaller(set1(a->limit), u)), set1(1));
                exponent = mul(g, set1(-a->alpha));
            } else {
                exponent = sub(set1(-0.0f), g);
            }
            gate.part[i] = mul(quotient(g, add(exponential(exponent), set1(1))), u);
        }
        store_part(a->out + row * a->width + d, rounded_group(gate, a->rounded), a->width - d);
    }
}

static void rotate_head(const rotation *r, const float *x, float *out, long row) {
    const float *cosine = r->cosine + row * r->pairs, *sine = r->sine + row * r->pairs;
    const long step = r->interleaved ? 2 : 1, apart = r->interleaved ? 1 : r->pairs;
    for (long p = 0; p < r->pairs; p++) {
        float first = x[p * step], second = x[p * step + apart];
        out[p * step] = first * cosine[p] - second * sine[p];
        out[p * step + apart] = second * cosine[p] + first * sine[p];
    }
    for (long d = 2 * r->pairs; d < r->dim; d++)
        out[d] = x[d];
    for (long d = 0; r->rounded && d < r->dim; d += GROUP)
        store_part(out + d, rounded_group(load_part(out + d, r->dim - d), 1), r->dim - d);
}

static void rotate_row(const void *argument, long row) {
    const rotation *r = argument;
    float numbers[r->dim], normalized[r->dim];
    for (long h = 0; h < r->heads; h++) {
        const float *x = r->x + row * r->stride + h * r->dim;
        if (r->weight) {
            normalize(x, r->weight, normalized, r->dim, r->eps, r->quotient_rounded, r->rounded);
            x = normalized;
        }
        if (r->cosine) {
            rotate_head(r, x, numbers, row);
            x = numbers;
        }
        if (r->out)
            memcpy(r->out + (row * r->heads + h) * r->dim, x, sizeof(float) * (size_t)r->dim);
        else if (r->is_bfloat16) {
            uint16_t *to = (uint16_t *)r->cache + (r->cached[row] * r->heads + h) * r->dim;
            const uint32_t *bits = (const uint32_t *)x;
            for (long d = 0; d < r->dim; d++)
                to[d] = (uint16_t)(bits[d] >> 16);
        } else {
            memcpy((float *)r->cache + (r->cached[row] * r->heads + h) * r->dim, x, sizeof(float) * (size_t)r->dim);
        }
    }
}

static void gather_row(const void *argument, long row) {
    const gathering *g = argument;
    long from = (g->index ? g->index[row] : row) * g->width, to = row * g->width;
    if (g->widens) {
        const uint16_t *bits = (const uint16_t *)g->from + from;
        for (long d = 0; d < g->width; d++)
            ((uint32_t *)g->to)[to + d] = (uint32_t)bits[d] << 16;
    } else if (g->narrows) {
        const uint32_t *numbers = (const uint32_t *)g->from + from;
        for (long d = 0; d < g->width; d++)
            ((uint16_t *)g->to)[to + d] = (uint16_t)(numbers[d] >> 16);
    } else {
        memcpy((char *)g->to + to * g->bytes, (const char *)g->from + from * g->bytes, (size_t)(g->width * g->bytes));
    }
}

static void combine_row(const void *argument, long row) {
    const combination *c = argument;
    for (long d = 0; d < c->width; d += GROUP) {
        long left = c->width - d;
        group sum = same(0);
        for (long k = 0; k < c->slots; k++) {
            long at = c->output_rows[row * c->slots + k] * c->width + d;
            group numbers;
            if (c->is_bfloat16) {
                const uint16_t *bits = (const uint16_t *)c->buffer + at;
                numbers = left >= GROUP ? load_bfloat16(bits) : load_some_bfloat16(bits, left);
            } else {
                numbers = load_part((const float *)c->buffer + at, left);
            }
            vec weight = set1(c->weights[row * c->slots + k]);
            EACH(i) sum.part[i] = add(sum.part[i], mul(numbers.part[i], weight));
        }
        sum = rounded_group(sum, c->rounded);
        for (int a = 0; a < 2 && c->addends[a]; a++) {
            group addend = load_part(c->addends[a] + row * c->width + d, left);
            EACH(i) sum.part[i] = add(sum.part[i], addend.part[i]);
            sum = rounded_group(sum, c->rounded);
        }
        store_part(c->out + row * c->width + d, sum, left);
    }
}

static void sum_block(const void *argument, long number) {
    const exponential_sums *e = argument;
    long blocks = (e->width + e->block - 1) / e->block, first = number % blocks * e->block;
    long width = smallest(e->block, e->width - first);
    const float *logits = e->logits + number / blocks * e->width + first;
    float most = -INFINITY;
    for (long i = 0; i < width; i++)
        most = logits[i] > most || logits[i] != logits[i] ? logits[i] : most;
    group sum = same(0);
    for (long i = 0; i < width && most > -INFINITY; i += GROUP) {
        long left = width - i;
        float numbers[GROUP];
        group g = load_part(logits + i, left);
        EACH(v) g.part[v] = exponential(sub(g.part[v], set1(most)));
        store_group(numbers, g);
        for (long j = left; j < GROUP; j++)
            numbers[j] = 0;
        g = load_group(numbers);
        EACH(v) sum.part[v] = add(sum.part[v], g.part[v]);
    }
    e->highest[number] = most;
    e->sums[number] = sum_of(sum);
}

#define HALF_PI 1.5707963267948966
#define HALF_PI_REST 6.123233995736766e-17 /* pi / 2 less HALF_PI */

/* The cosine and the sine of an angle >= 0, by Taylor's series around the nearest multiple of pi / 2; in double
 * precision: they round to the float32 numbers of the exact ones, but for very rare cases.
 */
INLINE void cosine_and_sine(double angle, double *cosine, double *sine) {
    double quarters = rint(angle * (1 / HALF_PI));
    double r = __builtin_fma(-quarters, HALF_PI_REST, __builtin_fma(-quarters, HALF_PI, angle)), square = r * r;
    double c = 0, s = 0; /* (cos r - 1) / r^2 and (sin r - r) / r^3 */
    static const double factorials[] = {20922789888000.0, 87178291200.0, 479001600.0, 3628800.0, 40320.0, 720.0,
                                        24.0,             2.0}; /* 16!, 14!, .. 2! */
    for (int i = 0; i < 8; i++) {
        double sign = i % 2 ? -1 : 1;
        c = __builtin_fma(c, square, sign / factorials[i]);
        s = __builtin_fma(s, square, sign / (factorials[i] * (17 - 2 * i)));
    }
    c = __builtin_fma(c, square, 1);
    s = __builtin_fma(s * square, r, r);
    long quarter = (long)quarters & 3;
    double even = quarter & 1 ? s : c, odd = quarter & 1 ? c : s;
    *cosine = quarter == 1 || quarter == 2 ? -even : even;
    *sine = quarter >= 2 ? -odd : odd;
}

static void angle_row(const void *argument, long row) {
    const angles *a = argument;
    for (long p = 0; p < a->pairs; p++) {
        double cosine, sine;
        cosine_and_sine((float)a->positions[row] * a->frequencies[p], &cosine, &sine);
        a->cosine[row * a->pairs + p] = (float)cosine * a->amplitude;
        a->sine[row * a->pairs + p] = (float)sine * a->amplitude;
    }
}

typedef struct {
    void (*task)(const void *, long);
    const void *argument;
    long rows, at_once;
} shared_rows;

static void do_rows(const void *argument, long index) {
    const shared_rows *s = argument;
    for (long row = index * s->at_once; row < s->rows && row < (index + 1) * s->at_once; row++)
        s->task(s->argument, row);
}

/* Share rows of `width` numbers in tasks of TASK_NUMBERS numbers or more. */
static void share_rows(void (*task)(const void *, long), const void *argument, long rows, long width) {
    shared_rows s = {task, argument, rows, width < TASK_NUMBERS ? TASK_NUMBERS / (width > 0 ? width : 1) : 1};
    share_tasks(do_rows, &s, (rows + s.at_once - 1) / s.at_once);
}

void normalize_rows(const norm *n) { share_rows(normalize_row, n, n->rows, n->heads * n->width); }
void activate_rows(const activation *a) { share_rows(activate_row, a, a->rows, 2 * a->width); }
void rotate_rows(const rotation *r) { share_rows(rotate_row, r, r->rows, r->heads * r->dim); }
void gather_rows(const gathering *g) { share_rows(gather_row, g, g->rows, g->width); }
void sum_exponentials(const exponential_sums *e) {
    share_rows(sum_block, e, e->rows * ((e->width + e->block - 1) / e->block), smallest(e->width, e->block));
}
void angle_rows(const angles *a) { share_rows(angle_row, a, a->rows, 8 * a->pairs); }
void combine_rows(const combination *c) { share_rows(combine_row, c, c->rows, c->slots * c->width); }
