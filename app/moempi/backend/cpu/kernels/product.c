/* Products of rows with packed matrices.
 *
 *   out[t, n] = round( bias[n] + sum over k of x[t, k] * w[k, n] )        x (T, K), w (K, N), out (T, N), all float32
 *
 * The sum of an output is one chain of fused multiply-adds, with inputs 1, 0, 3, 2, 5, 4 and so on. Subnormal numbers
 * count as zero. The bits of an output depend on the row and the weights alone: not on other rows, on threads, on the
 * type in which the weights are stored or on the processor. Products of TILED weights are computed by tiled_product.c,
 * with other bits.
 *
 * This is the chain of the processors' own products of pairs of bfloat16 numbers (AVX512-BF16), which are used for rows
 * of bfloat16 values where `pairs_are_chains` and `pairs_are_faster` find that they have the same bits and take less time.
 *
 * A matrix is packed into panels of PANEL outputs, with zeros beyond N and an odd K:
 *   FLOAT32   packed[n / PANEL][k][n % PANEL]
 *   BFLOAT16  packed[n / PANEL][k / 2][n % PANEL][k % 2]        the weights of two inputs in a word
 * A tile of rows and panels keeps its sums in registers. Rows are computed in blocks of at most BLOCK_ROWS, blocks in
 * runs that fit in the second-level cache; a block is packed as [k][row], for products of pairs as words [k / 2][row].
 *
 * NumPy twin: `NumpyBackend._product`.
 */
#include "kernels.h"
#include "simd.h"
#include "threads.h"
#include "tiled_product.h"
#include "trials.h"
#include <time.h>

#define PANEL (2 * LANES)
#define BLOCK_ROWS (LANES == 8 ? 5 : 12) /* AVX2 has 16 registers, the others 32 */
#define MOST_PANELS 4
#define RUN_BLOCKS (LANES == 8 ? 19 : 8)
#define RUN_WORDS 768
#define PREFETCHED_ROWS 20 /* most rows of a run with AVX2 where reading weights takes about as long as arithmetic */
#define PREFETCH_BYTES 2048
#define TASK_FLOPS 4e6        /* least work of a task, where a product has so much */
#define FEW_WORDS (1L << 14)  /* packed words that threads do not share */
#define TILED_RUN 64          /* rows that a thread packs at a time */

typedef struct {
    const product *products;
    long first, panels; /* the first task, and the panels of a task */
    float *scratch;
} call;

/* A tile: one block of rows and adjacent panels, over a run of inputs. */
typedef struct {
    const float *x; /* [k][row], of PAIRS words [k / 2][row] */
    const char *packed;
    long steps, panel_bytes;
    float *out;
    long out_stride;
    const float *bias;
    int starts, ends, rounded;
} tile;

static inline long quotient_up(long a, long b) { return (a + b - 1) / b; }
static inline long panels_of(const product *p) { return quotient_up(p->outputs, PANEL); }
/* A step takes two inputs. PAIRS: they are a word of a packed row, and so are their weights. */
enum { PAIRS = TILED + 1 };
static int uses_pairs = 1;
static inline int kind_of(const product *p) {
    if (p->weights == FLOAT32 || !p->narrow)
        return p->weights == FLOAT32 ? FLOAT32 : BFLOAT16;
    return HAS_TILES && p->weights == TILED ? TILED : HAS_PAIRS && uses_pairs ? PAIRS : BFLOAT16;
}
static inline long steps_of(const product *p) { return quotient_up(p->inputs, 2); }
static inline long step_bytes(int kind) { return PANEL * (kind == FLOAT32 ? 8 : 4); } /* of a panel */
static inline long words_of_step(int kind) { return kind == PAIRS ? 1 : 2; }                /* of a packed row */
static inline long words_of(const product *p) {
    return kind_of(p) == TILED ? tiled_inputs(p->inputs) / 2 : steps_of(p) * words_of_step(kind_of(p));
}
static inline long scratch_of(const product *p) { return p->rows * (words_of(p) + PANEL); }
static inline long run_steps(const product *p) {
    return p->rows <= BLOCK_ROWS ? steps_of(p) : RUN_WORDS / words_of_step(kind_of(p));
}
static inline int packs_rows(const product *p) {
    return p->rows > 1 || kind_of(p) == PAIRS || kind_of(p) == TILED || words_of(p) != p->inputs;
}
static inline const float *row_of(const product *p, long t) {
    return p->x + (p->index ? p->index[t] : t) * p->x_stride;
}
static inline long rows_of_run(const product *p) { return kind_of(p) == TILED ? TILED_RUN : RUN_BLOCKS * BLOCK_ROWS; }
static inline long packed_runs(const product *p) { return packs_rows(p) ? quotient_up(p->rows, rows_of_run(p)) : 0; }

long panel_outputs(void) { return PANEL; }

/* Numbers of scratch memory that a row of a product takes at most, beside its inputs: sums of a panel that is not whole,
 * and inputs up to the next pair, or half of those up to the next tile. */
long row_scratch(void) { return PANEL + TILE_WORDS; }

/* Whether products of pairs, if they are compiled, have the bits of the chain: these are tried. */
int pairs_are_chains(void) {
    enum { TRIES = 2048 };
    uint64_t state = 1;
    long before = flush_subnormals();
    int same = 1;
    for (int i = 0; i < TRIES * HAS_PAIRS * RANGES; i++) {
        uint32_t x[LANES], w[LANES], sums[LANES];
        try_pairs(&state, i, x, LANES);
        try_pairs(&state, i, w, LANES);
        try_sums(&state, i, sums, LANES);
        ivec some = load_bits(x), other = load_bits(w);
        vec sum = as_floats(load_bits(sums));
        float pairs[LANES], chain[LANES];
        store(pairs, fused_pairs(as_floats(some), as_floats(other), sum));
        store(chain, fused(low_half(some), low_half(other), fused(high_half(some), high_half(other), sum)));
        same &= same_bits(pairs, chain, LANES);
    }
    restore_subnormals(before);
    return same;
}

/* Seconds of this thread in which a block of sums gets the products of `rounds` pairs. */
static double seconds_of(long rounds, int by_pairs) {
    enum { SUMS = LANES == 8 ? 12 : 24 };
    vec sums[SUMS], x = set1(1e-6f), w = set1(1e-6f);
    struct timespec begin, end;
    for (int i = 0; i < SUMS; i++)
        sums[i] = set1((float)i);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begin);
    for (long r = 0; r < rounds; r++)
        for (int i = 0; i < SUMS; i++)
            sums[i] = by_pairs ? fused_pairs(x, w, sums[i]) : fused(x, w, fused(w, x, sums[i]));
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
    for (int i = 1; i < SUMS; i++)
        sums[0] = add(sums[0], sums[i]);
    volatile float used = sum_of((group){{sums[0]}}); /* so that the compiler keeps the sums */
    (void)used;
    return (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
}

/* Whether a pair takes less time than two multiply-adds, by the least of some measurements; 1 without products of pairs. */
int pairs_are_faster(void) {
    enum { TRIES = 20, ROUNDS = 500 };
    double pairs = 1, chain = 1;
    for (int i = 0; i < TRIES; i++) {
        double of_pairs = seconds_of(ROUNDS, 1), of_chain = seconds_of(ROUNDS, 0);
        pairs = of_pairs < pairs ? of_pairs : pairs;
        chain = of_chain < chain ? of_chain : chain;
    }
    return !HAS_PAIRS || pairs < chain;
}

/* Use the processor's products of pairs from now on, or not; returns the choice until now. */
int use_pairs(int choice) {
    int before = uses_pairs;
    uses_pairs = choice;
    return before;
}

/* Pack w, (N, K) or (K, N) if `transposed`, into the outputs from `first` on of a matrix of zeros. */
void pack(const void *w, void *packed, long inputs, long outputs, long first, int transposed, int weights) {
    long column = quotient_up(inputs, 2) * 2 * PANEL; /* numbers of a panel */
    for (long n0 = 0; n0 < outputs; n0 += PANEL)
        for (long k0 = 0; k0 < inputs; k0 += PANEL)
            for (long n = n0; n < smallest(n0 + PANEL, outputs); n++) {
                long output = (first + n) % PANEL, panel = (first + n) / PANEL * column;
                for (long k = k0; k < smallest(k0 + PANEL, inputs); k++) {
                    long from = transposed ? k * outputs + n : n * inputs + k;
                    if (weights == FLOAT32)
                        ((float *)packed)[panel + k * PANEL + output] = ((const float *)w)[from];
                    else
                        ((uint16_t *)packed)[panel + k / 2 * 2 * PANEL + output * 2 + k % 2] =
                            ((const uint16_t *)w)[from];
                }
            }
}

/* The rows of block i of a run; blocks of a run differ by at most one row. */
static inline long block_end(long rows, long blocks, long i) { return rows * (i + 1) / blocks; }

/* Numbers 2 i and 2 i + 1 of a row of `inputs` bfloat16 values, in the halves of a word. */
static inline uint32_t pair_at(const float *x, long i, long inputs) {
    const uint32_t *bits = (const uint32_t *)x;
    return bits[2 * i] >> 16 | (2 * i + 1 < inputs ? bits[2 * i + 1] & 0xFFFF0000u : 0);
}

/* Pack `steps` steps, from number `s0` on, of row t of a block of `width` rows. */
static inline void pack_row(const product *p, const float *from, float *to, long s0, long steps, long width, long t) {
    if (kind_of(p) == PAIRS) {
        for (long s = 0; s < steps; s++)
            ((uint32_t *)to)[s * width + t] = pair_at(from, s0 + s, p->inputs);
        return;
    }
    long words = words_of_step(kind_of(p)), first = s0 * words, count = smallest(steps * words, p->inputs - first);
    for (long k = 0; k < count; k++)
        to[k * width + t] = from[first + k];
    if (count < steps * words)
        to[count * width + t] = 0;
}

/* Pack the rows of one run: [run of steps][block][word][row]. */
static void pack_run(const product *p, float *scratch, long first) {
    long rows = smallest(p->rows - first, RUN_BLOCKS * BLOCK_ROWS), blocks = quotient_up(rows, BLOCK_ROWS);
    float *to = scratch + first * words_of(p);
    for (long s0 = 0; s0 < steps_of(p); s0 += run_steps(p)) {
        long steps = smallest(steps_of(p) - s0, run_steps(p)), begin = 0;
        for (long i = 0; i < blocks; i++) {
            long end = block_end(rows, blocks, i), width = end - begin;
            for (long t = 0; t < width; t++)
                pack_row(p, row_of(p, first + begin + t), to, s0, steps, width, t);
            to += steps * words_of_step(kind_of(p)) * width;
            begin = end;
        }
    }
}

/* Add the products of one word of each row and the weights `low` and `high` of a panel's outputs, with `operation`. */
#define ADD_PRODUCTS(operation, x, low, high) \
    for (int r = 0; r < rows; r++) { \
        const vec number = set1((x)[r]); \
        sums[r][2 * p] = operation(number, low, sums[r][2 * p]); \
        sums[r][2 * p + 1] = operation(number, high, sums[r][2 * p + 1]); \
    }

/* `rows`, `panels`, `kind` and `prefetches` are constants after inlining; all outputs of the panels exist. */
INLINE void compute(const tile *t, const int rows, const int panels, const int kind, const int prefetches) {
    vec sums[BLOCK_ROWS][2 * MOST_PANELS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2 * panels; v++)
            sums[r][v] = t->starts ? set1(0) : load(t->out + r * t->out_stride + v * LANES);
    const char *packed = t->packed;
    const float *x = t->x;
    for (long s = 0; s < t->steps; s++, packed += step_bytes(kind), x += rows * words_of_step(kind))
        for (int p = 0; p < panels; p++) {
            const char *words = packed + p * t->panel_bytes;
            for (long line = 0; prefetches && line < step_bytes(kind); line += 64)
                __builtin_prefetch(words + PREFETCH_BYTES + line);
            const ivec low = load_bits(words), high = load_bits(words + 4 * LANES);
            if (kind == PAIRS) {
                ADD_PRODUCTS(fused_pairs, x, as_floats(low), as_floats(high))
            } else if (kind == BFLOAT16) {
                const vec odd_low = high_half(low), odd_high = high_half(high);
                ADD_PRODUCTS(fused, x + rows, odd_low, odd_high)
                const vec even_low = low_half(low), even_high = low_half(high);
                ADD_PRODUCTS(fused, x, even_low, even_high)
            } else {
                const float *numbers = (const float *)words + PANEL; /* of the second input */
                const vec odd_low = load(numbers), odd_high = load(numbers + LANES);
                ADD_PRODUCTS(fused, x + rows, odd_low, odd_high)
                ADD_PRODUCTS(fused, x, as_floats(low), as_floats(high))
            }
        }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2 * panels; v++) {
            vec sum = sums[r][v];
            if (t->ends && t->bias)
                sum = add(sum, load(t->bias + v * LANES));
            if (t->ends && t->rounded)
                sum = nearest_bfloat16(sum);
            store(t->out + r * t->out_stride + v * LANES, sum);
        }
}

#define PANELS(rows) ((rows) == 1 || 4 * (rows) <= BLOCK_ROWS ? 4 : 2 * (rows) <= BLOCK_ROWS ? 2 : 1)

/* `count` whole panels of a block of `rows` rows. */
INLINE void compute_panels(tile t, long count, const int rows, const int kind, const int prefetches) {
    for (long left = count; left > 0;) {
        int panels = left >= PANELS(rows) ? PANELS(rows) : 1;
        if (panels == PANELS(rows))
            compute(&t, rows, PANELS(rows), kind, prefetches);
        else
            compute(&t, rows, 1, kind, prefetches);
        t.packed += panels * t.panel_bytes;
        t.out += panels * PANEL;
        t.bias = t.bias ? t.bias + panels * PANEL : NULL;
        left -= panels;
    }
}

#define CASE(rows, prefetches) \
    case rows: \
        if (kind == FLOAT32) \
            compute_panels(t, count, rows, FLOAT32, prefetches); \
        else if (HAS_PAIRS && kind == PAIRS) \
            compute_panels(t, count, rows, PAIRS, prefetches); \
        else \
            compute_panels(t, count, rows, BFLOAT16, prefetches); \
        break;

/* The same for a number of rows and a kind that are no constants. */
static void compute_block(tile t, long count, long rows, int kind) {
    switch (rows) {
        CASE(1, 0) CASE(2, 0) CASE(3, 0) CASE(4, 0) CASE(5, 0)
#if BLOCK_ROWS > 5
        CASE(6, 0) CASE(7, 0) CASE(8, 0) CASE(9, 0) CASE(10, 0) CASE(11, 0) CASE(12, 0)
#endif
    }
}

static void compute_prefetching(tile t, long count, long rows, int kind) {
    switch (rows) { CASE(1, 0) CASE(2, 0) CASE(3, 1) CASE(4, 1) CASE(5, 1) }
}
#undef CASE

/* `count` whole panels from the one at `t` on, of the run of rows whose packed blocks begin at t.x. */
static void compute_run(tile t, long count, long rows, int kind) {
    const int prefetching = BLOCK_ROWS == 5 && rows <= PREFETCHED_ROWS;
    long blocks = quotient_up(rows, BLOCK_ROWS), at_once = blocks == 1 ? count : 1;
    for (long panel = 0; panel < count; panel += at_once) {
        tile here = t;
        here.packed += panel * t.panel_bytes;
        here.bias = t.bias ? t.bias + panel * PANEL : NULL;
        for (long i = 0, begin = 0; i < blocks; i++) {
            long end = block_end(rows, blocks, i);
            here.out = t.out + begin * t.out_stride + panel * PANEL;
            if (prefetching)
                compute_prefetching(here, at_once, end - begin, kind);
            else
                compute_block(here, at_once, end - begin, kind);
            here.x += (end - begin) * t.steps * words_of_step(kind);
            begin = end;
        }
    }
}

/* Panels [first, last) for all rows; outputs that are no whole panel go to `edge` (rows, PANEL). */
static void compute_product(const product *p, const float *x, float *edge, long first, long last) {
    long all = steps_of(p), whole = smallest(last, p->outputs / PANEL), width = p->outputs % PANEL;
    int kind = kind_of(p);
    float bias[PANEL] = {0};
    if (p->bias && last > whole)
        memcpy(bias, p->bias + whole * PANEL, sizeof(float) * (size_t)width);
    for (long t = 0; t < p->rows; t += RUN_BLOCKS * BLOCK_ROWS) {
        long rows = smallest(p->rows - t, RUN_BLOCKS * BLOCK_ROWS);
        for (long s = 0; s < all; s += run_steps(p)) {
            long steps = smallest(all - s, run_steps(p)), panel_bytes = all * step_bytes(kind);
            tile here = {x + (t * all + s * rows) * words_of_step(kind), p->packed + first * panel_bytes + s * step_bytes(kind),
                         steps, panel_bytes, p->out + t * p->out_stride + first * PANEL, p->out_stride,
                         p->bias ? p->bias + first * PANEL : NULL, s == 0, s + steps == all, p->rounded};
            compute_run(here, whole - first, rows, kind);
            if (last > whole) {
                here.packed += (whole - first) * panel_bytes;
                here.out = edge + t * PANEL;
                here.out_stride = PANEL;
                here.bias = p->bias ? bias : NULL;
                compute_run(here, 1, rows, kind);
            }
        }
    }
    for (long t = 0; last > whole && t < p->rows; t++)
        memcpy(p->out + t * p->out_stride + whole * PANEL, edge + t * PANEL, sizeof(float) * (size_t)width);
}

static void pack_rows_of(const void *argument, long index) {
    const call *of = argument;
    float *scratch = of->scratch;
    for (const product *p = of->products;; scratch += scratch_of(p++)) {
        if (index < packed_runs(p)) {
            long first = index * rows_of_run(p);
            if (kind_of(p) == TILED)
                pack_tiled(p, (uint16_t *)scratch, first, smallest(p->rows - first, rows_of_run(p)));
            else
                pack_run(p, scratch, first);
            return;
        }
        index -= packed_runs(p);
    }
}

static void compute_task(const void *argument, long index) {
    const call *of = argument;
    float *scratch = of->scratch;
    index += of->first;
    for (const product *p = of->products;; scratch += scratch_of(p++)) {
        long tasks = quotient_up(panels_of(p), of->panels);
        if (index < tasks) {
            long first = index * of->panels, last = smallest(first + of->panels, panels_of(p)), before = flush_subnormals();
            float *edge = scratch + p->rows * words_of(p);
            if (kind_of(p) == TILED)
                multiply_tiled(p, (const uint16_t *)scratch, edge, first, last);
            else
                compute_product(p, packs_rows(p) ? scratch : row_of(p, 0), edge, first, last);
            restore_subnormals(before);
            return;
        }
        index -= tasks;
    }
}

/* Panels of a task: a task has TASK_FLOPS of work, but all threads have tasks. */
static long task_panels(const product *products, long count) {
    double panels = 0, flops = 1;
    for (const product *p = products; p < products + count; p++) {
        panels += (double)panels_of(p);
        flops += 2.0 * (double)p->rows * (double)p->inputs * (double)p->outputs;
    }
    return largest(1, smallest((long)(TASK_FLOPS * panels / flops), quotient_up((long)panels, thread_count())));
}

/* The tasks of several products: adjacent panels of one, all of a product before the next. */
long product_tasks(const product *products, long count) {
    long panels = task_panels(products, count), tasks = 0;
    for (long i = 0; i < count; i++)
        tasks += quotient_up(panels_of(products + i), panels);
    return tasks;
}

/* Compute the tasks [first, last) of several products.
 *
 * `scratch` is memory for rows * (inputs + row_scratch()) numbers of each product, which the call with the first task fills.
 */
void multiply(const product *products, long count, float *scratch, long first, long last) {
    call of = {products, first, task_panels(products, count), scratch};
    long runs = 0, words = 0;
    for (long i = 0; i < count && first == 0; i++) {
        runs += packed_runs(products + i);
        words += products[i].rows * words_of(products + i);
    }
    if (words > FEW_WORDS)
        share_tasks(pack_rows_of, &of, runs);
    else
        for (long i = 0; i < runs; i++)
            pack_rows_of(&of, i);
    share_tasks(compute_task, &of, last - first);
}
