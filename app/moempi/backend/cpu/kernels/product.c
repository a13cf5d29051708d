/* Products of rows with packed matrices.
 *
 *   out[t, n] = round( bias[n] + sum over k of x[t, k] * w[k, n] )        x (T, K), w (K, N), out (T, N), all float32
 *
 * The sum of an output is one chain of fused multiply-adds in ascending order of k: its bits depend on the row and the
 * weights alone, not on other rows, threads, the layout in memory or the processor (but for PAIRS).
 *
 * A matrix is packed into panels of PANEL outputs, with zeros beyond N. Weights that are stored as bfloat16 stay so:
 *   FLOAT32   packed[n / PANEL][k][n % PANEL]
 *   BFLOAT16  packed[n / PANEL][k][n % LANES][n / LANES % 2]    two outputs in a word
 *   PAIRS     packed[n / PANEL][k / 2][n % PANEL][k % 2]        two inputs in a word, with zeros beyond an odd K
 * PAIRS are for the bfloat16 products of a processor that has them: rows are of bfloat16 values, an operation adds the
 * products of two inputs to a sum, and its bits are of that operation; they depend on the row and the weights alone too.
 * A tile of rows and panels keeps its sums in registers. Rows are computed in blocks of at most BLOCK_ROWS, blocks in
 * runs that fit in the second-level cache; a block is packed as [k][row], with PAIRS as words [k / 2][row].
 *
 * NumPy twin: `NumpyBackend._product`.
 */
#include "kernels.h"
#include "simd.h"
#include "threads.h"

#define PANEL (2 * LANES)
#define BLOCK_ROWS (LANES == 8 ? 6 : 12)
#define MOST_PANELS 4
#define RUN_BLOCKS (LANES == 8 ? 16 : 8)
#define RUN_STEPS 768

typedef struct {
    const product *products;
    long first, panels; /* the first task, and the panels of a task */
    float *scratch;
} call;

/* A tile: one block of rows and adjacent panels, over a run of inputs. */
typedef struct {
    const float *x; /* [k][row] */
    const char *packed;
    long steps, panel_bytes;
    float *out;
    long out_stride;
    const float *bias;
    int starts, ends, rounded;
} tile;

static inline long quotient_up(long a, long b) { return (a + b - 1) / b; }
static inline long panels_of(const product *p) { return quotient_up(p->outputs, PANEL); }
static inline long inputs_of_step(const product *p) { return p->weights == PAIRS ? 2 : 1; }
static inline long steps_of(const product *p) { return quotient_up(p->inputs, inputs_of_step(p)); }
static inline long step_bytes(int weights) { return PANEL * (weights == BFLOAT16 ? 2 : 4); }
static inline long scratch_of(const product *p) { return p->rows * (steps_of(p) + PANEL); }
static inline long run_steps(const product *p) { return p->rows <= BLOCK_ROWS ? steps_of(p) : RUN_STEPS; }
static inline int packs_rows(const product *p) { return p->rows > 1 || p->weights == PAIRS; }
static inline long packed_runs(const product *p) {
    return packs_rows(p) ? quotient_up(p->rows, RUN_BLOCKS * BLOCK_ROWS) : 0;
}

long panel_outputs(void) { return PANEL; }
int has_pairs(void) { return HAS_PAIRS; }

/* Pack w, (N, K) or (K, N) if `transposed`, into the outputs from `first` on of a matrix of zeros. */
void pack(const void *w, void *packed, long inputs, long outputs, long first, int transposed, int weights) {
    long column = (weights == PAIRS ? quotient_up(inputs, 2) * 2 : inputs) * PANEL; /* numbers of a panel */
    for (long n0 = 0; n0 < outputs; n0 += PANEL)
        for (long k0 = 0; k0 < inputs; k0 += PANEL)
            for (long n = n0; n < smallest(n0 + PANEL, outputs); n++) {
                long output = (first + n) % PANEL, panel = (first + n) / PANEL * column;
                for (long k = k0; k < smallest(k0 + PANEL, inputs); k++) {
                    long from = transposed ? k * outputs + n : n * inputs + k;
                    if (weights == FLOAT32)
                        ((float *)packed)[panel + k * PANEL + output] = ((const float *)w)[from];
                    else if (weights == BFLOAT16)
                        ((uint16_t *)packed)[panel + k * PANEL + output % LANES * 2 + output / LANES] =
                            ((const uint16_t *)w)[from];
                    else
                        ((uint16_t *)packed)[panel + k / 2 * 2 * PANEL + output * 2 + k % 2] =
                            ((const uint16_t *)w)[from];
                }
            }
}

/* The rows of block i of a run; blocks of a run differ by at most one row. */
static inline long block_end(long rows, long blocks, long i) { return rows * (i + 1) / blocks; }

/* Words of two bfloat16 numbers: numbers 2 i and 2 i + 1 of a row of `inputs` numbers. */
static inline uint32_t pair_at(const float *x, long i, long inputs) {
    const uint32_t *bits = (const uint32_t *)x;
    return bits[2 * i] >> 16 | (2 * i + 1 < inputs ? bits[2 * i + 1] & 0xFFFF0000u : 0);
}

/* Pack the rows of one run: [run of steps][block][step][row]. */
static void pack_run(const product *p, float *scratch, long first) {
    long rows = smallest(p->rows - first, RUN_BLOCKS * BLOCK_ROWS), blocks = quotient_up(rows, BLOCK_ROWS);
    float *to = scratch + first * steps_of(p);
    for (long s0 = 0; s0 < steps_of(p); s0 += run_steps(p)) {
        long steps = smallest(steps_of(p) - s0, run_steps(p)), begin = 0;
        for (long i = 0; i < blocks; i++) {
            long end = block_end(rows, blocks, i), width = end - begin;
            for (long t = begin; t < end; t++) {
                const float *from = p->x + (first + t) * p->x_stride;
                if (p->weights == PAIRS)
                    for (long s = 0; s < steps; s++)
                        ((uint32_t *)to)[s * width + t - begin] = pair_at(from, s0 + s, p->inputs);
                else
                    for (long s = 0; s < steps; s++)
                        to[s * width + t - begin] = from[s0 + s];
            }
            to += steps * width;
            begin = end;
        }
    }
}

INLINE void load_weights(const char *at, vec *low, vec *high, const int weights) {
    if (weights == BFLOAT16) {
        ivec words = load_bits(at);
        *low = as_floats(left(words, 16));
        *high = as_floats(and_bits(words, bits1(0xFFFF0000u)));
    } else {
        *low = load((const float *)at);
        *high = load((const float *)at + LANES);
    }
}

INLINE vec add_product(vec number, vec weight, vec sum, const int weights) {
    return weights == PAIRS ? fused_pairs(number, weight, sum) : fused(number, weight, sum);
}

/* `rows`, `panels` and `weights` are constants after inlining; all outputs of the panels exist. */
INLINE void compute(const tile *t, const int rows, const int panels, const int weights) {
    vec sums[BLOCK_ROWS][2 * MOST_PANELS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2 * panels; v++)
            sums[r][v] = t->starts ? set1(0) : load(t->out + r * t->out_stride + v * LANES);
    const char *packed = t->packed;
    const float *x = t->x;
    for (long s = 0; s < t->steps; s++, packed += step_bytes(weights), x += rows)
        for (int p = 0; p < panels; p++) {
            vec low, high;
            load_weights(packed + p * t->panel_bytes, &low, &high, weights);
            for (int r = 0; r < rows; r++) {
                vec number = set1(x[r]);
                sums[r][2 * p] = add_product(number, low, sums[r][2 * p], weights);
                sums[r][2 * p + 1] = add_product(number, high, sums[r][2 * p + 1], weights);
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
INLINE void compute_panels(tile t, long count, const int rows, const int weights) {
    for (long left = count; left > 0;) {
        int panels = left >= PANELS(rows) ? PANELS(rows) : 1;
        if (panels == PANELS(rows))
            compute(&t, rows, PANELS(rows), weights);
        else
            compute(&t, rows, 1, weights);
        t.packed += panels * t.panel_bytes;
        t.out += panels * PANEL;
        t.bias = t.bias ? t.bias + panels * PANEL : NULL;
        left -= panels;
    }
}

static void compute_block(tile t, long count, long rows, int weights) {
#define CASE(n) \
    case n: \
        if (weights == FLOAT32) \
            compute_panels(t, count, n, FLOAT32); \
        else if (weights == BFLOAT16) \
            compute_panels(t, count, n, BFLOAT16); \
        else if (HAS_PAIRS) \
            compute_panels(t, count, n, PAIRS); \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if BLOCK_ROWS > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
#undef CASE
}

/* `count` whole panels from the one at `t` on, of the run of rows whose packed blocks begin at t.x. */
static void compute_run(tile t, long count, long rows, int weights) {
    long blocks = quotient_up(rows, BLOCK_ROWS), at_once = blocks == 1 ? count : 1;
    for (long panel = 0; panel < count; panel += at_once) {
        tile here = t;
        here.packed += panel * t.panel_bytes;
        here.bias = t.bias ? t.bias + panel * PANEL : NULL;
        for (long i = 0, begin = 0; i < blocks; i++) {
            long end = block_end(rows, blocks, i);
            here.out = t.out + begin * t.out_stride + panel * PANEL;
            compute_block(here, at_once, end - begin, weights);
            here.x += (end - begin) * t.steps;
            begin = end;
        }
    }
}

/* Panels [first, last) for all rows; outputs that are no whole panel go to `edge` (rows, PANEL). */
static void compute_product(const product *p, const float *x, float *edge, long first, long last) {
    long all = steps_of(p), whole = smallest(last, p->outputs / PANEL), width = p->outputs % PANEL;
    float bias[PANEL] = {0};
    if (p->bias && last > whole)
        memcpy(bias, p->bias + whole * PANEL, sizeof(float) * (size_t)width);
    for (long t = 0; t < p->rows; t += RUN_BLOCKS * BLOCK_ROWS) {
        long rows = smallest(p->rows - t, RUN_BLOCKS * BLOCK_ROWS);
        for (long s = 0; s < all; s += run_steps(p)) {
            long steps = smallest(all - s, run_steps(p)), panel_bytes = all * step_bytes(p->weights);
            tile here = {x + t * all + s * rows, p->packed + first * panel_bytes + s * step_bytes(p->weights), steps,
                         panel_bytes, p->out + t * p->out_stride + first * PANEL, p->out_stride,
                         p->bias ? p->bias + first * PANEL : NULL, s == 0, s + steps == all, p->rounded};
            compute_run(here, whole - first, rows, p->weights);
            if (last > whole) {
                here.packed += (whole - first) * panel_bytes;
                here.out = edge + t * PANEL;
                here.out_stride = PANEL;
                here.bias = p->bias ? bias : NULL;
                compute_run(here, 1, rows, p->weights);
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
            pack_run(p, scratch, index * RUN_BLOCKS * BLOCK_ROWS);
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
            long first = index * of->panels, last = smallest(first + of->panels, panels_of(p));
            compute_product(p, packs_rows(p) ? scratch : p->x, scratch + p->rows * steps_of(p), first, last);
            return;
        }
        index -= tasks;
    }
}

/* Compute the tasks [first, last) of several products: `panels` panels each, all of a product before the next.
 *
 * `scratch` is memory for rows * (inputs + PANEL) numbers of each product, which the call with the first task fills.
 */
void multiply(const product *products, long count, float *scratch, long panels, long first, long last) {
    call of = {products, first, panels, scratch};
    long runs = 0;
    for (long i = 0; i < count && first == 0; i++)
        runs += packed_runs(products + i);
    share_tasks(pack_rows_of, &of, runs);
    share_tasks(compute_task, &of, last - first);
}
