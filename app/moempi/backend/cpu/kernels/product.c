/* Products of rows with packed matrices.
 *
 *   out[t, n] = round( bias[n] + sum over k of x[t, k] * w[k, n] )        x (T, K), w (K, N), out (T, N), all float32
 *
 * The sum of an output is one chain of fused multiply-adds in ascending order of k: its bits depend on the row and the
 * weights alone, not on other rows, threads, the layout in memory or the processor.
 *
 * A matrix is packed into panels of PANEL outputs, with zeros beyond N. Weights that are stored as bfloat16 stay so:
 *   bfloat16  packed[n / PANEL][k][n % LANES][n / LANES % 2]    two outputs in a word
 *   float32   packed[n / PANEL][k][n % PANEL]
 * A tile of rows and panels keeps its sums in registers. Rows are computed in blocks of at most BLOCK_ROWS, blocks in
 * runs that fit in the second-level cache; a block is packed as [k][row].
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
#define RUN_INPUTS 768

typedef struct {
    const product *products;
    long first, panels; /* the first task, and the panels of a task */
    float *scratch;
} call;

/* A tile: one block of rows and adjacent panels, over a run of inputs. */
typedef struct {
    const float *x; /* [k][row] */
    const char *weights;
    long inputs, panel_bytes;
    float *out;
    long out_stride;
    const float *bias;
    int starts, ends, rounded;
} tile;

static inline long quotient_up(long a, long b) { return (a + b - 1) / b; }
static inline long panels_of(const product *p) { return quotient_up(p->outputs, PANEL); }
static inline long step_bytes(const product *p) { return PANEL * (p->is_bfloat16 ? 2 : 4); }
static inline long scratch_of(const product *p) { return p->rows * (p->inputs + PANEL); }
static inline long run_inputs(const product *p) { return p->rows <= BLOCK_ROWS ? p->inputs : RUN_INPUTS; }

static inline long packed_runs(const product *p) { return p->rows > 1 ? quotient_up(p->rows, RUN_BLOCKS * BLOCK_ROWS) : 0; }

long panel_outputs(void) { return PANEL; }

/* Pack w, (N, K) or (K, N) if `transposed`, into the outputs from `first` on of a matrix of zeros. */
void pack(const void *w, void *packed, long inputs, long outputs, long first, int transposed, int is_bfloat16) {
    for (long n0 = 0; n0 < outputs; n0 += PANEL)
        for (long k0 = 0; k0 < inputs; k0 += PANEL)
            for (long n = n0; n < smallest(n0 + PANEL, outputs); n++) {
                long place = (first + n) % PANEL, column = (first + n) / PANEL * inputs * PANEL;
                if (is_bfloat16)
                    place = place % LANES * 2 + place / LANES;
                for (long k = k0; k < smallest(k0 + PANEL, inputs); k++) {
                    long from = transposed ? k * outputs + n : n * inputs + k, to = column + k * PANEL + place;
                    if (is_bfloat16)
                        ((uint16_t *)packed)[to] = ((const uint16_t *)w)[from];
                    else
                        ((float *)packed)[to] = ((const float *)w)[from];
                }
            }
}

/* The rows of block i of a run; blocks of a run differ by at most one row. */
static inline long block_end(long rows, long blocks, long i) { return rows * (i + 1) / blocks; }

/* Pack the rows of one run: [run of inputs][block][k][row]. */
static void pack_run(const product *p, float *scratch, long first) {
    long rows = smallest(p->rows - first, RUN_BLOCKS * BLOCK_ROWS), blocks = quotient_up(rows, BLOCK_ROWS);
    float *to = scratch + first * p->inputs;
    for (long k0 = 0; k0 < p->inputs; k0 += run_inputs(p)) {
        long inputs = smallest(p->inputs - k0, run_inputs(p)), begin = 0;
        for (long i = 0; i < blocks; i++) {
            long end = block_end(rows, blocks, i), width = end - begin;
            for (long t = begin; t < end; t++) {
                const float *from = p->x + (first + t) * p->x_stride + k0;
                for (long k = 0; k < inputs; k++)
                    to[k * width + t - begin] = from[k];
            }
            to += inputs * width;
            begin = end;
        }
    }
}

INLINE void load_weights(const char *at, vec *low, vec *high, const int is_bfloat16) {
    if (is_bfloat16) {
        ivec words = load_bits(at);
        *low = as_floats(left(words, 16));
        *high = as_floats(and_bits(words, bits1(0xFFFF0000u)));
    } else {
        *low = load((const float *)at);
        *high = load((const float *)at + LANES);
    }
}

/* `rows`, `panels` and `is_bfloat16` are constants after inlining; all outputs of the panels exist. */
INLINE void compute(const tile *t, const int rows, const int panels, const int is_bfloat16) {
    vec sums[BLOCK_ROWS][2 * MOST_PANELS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2 * panels; v++)
            sums[r][v] = t->starts ? set1(0) : load(t->out + r * t->out_stride + v * LANES);
    const char *weights = t->weights;
    const float *x = t->x;
    for (long k = 0; k < t->inputs; k++, weights += PANEL * (is_bfloat16 ? 2 : 4), x += rows)
        for (int p = 0; p < panels; p++) {
            vec low, high;
            load_weights(weights + p * t->panel_bytes, &low, &high, is_bfloat16);
            for (int r = 0; r < rows; r++) {
                vec number = set1(x[r]);
                sums[r][2 * p] = fused(number, low, sums[r][2 * p]);
                sums[r][2 * p + 1] = fused(number, high, sums[r][2 * p + 1]);
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
INLINE void compute_panels(tile t, long count, const int rows, const int is_bfloat16) {
    for (long left = count; left > 0;) {
        int panels = left >= PANELS(rows) ? PANELS(rows) : 1;
        if (panels == PANELS(rows))
            compute(&t, rows, PANELS(rows), is_bfloat16);
        else
            compute(&t, rows, 1, is_bfloat16);
        t.weights += panels * t.panel_bytes;
        t.out += panels * PANEL;
        t.bias = t.bias ? t.bias + panels * PANEL : NULL;
        left -= panels;
    }
}

static void compute_block(tile t, long count, long rows, int is_bfloat16) {
#define CASE(n) \
    case n: is_bfloat16 ? compute_panels(t, count, n, 1) : compute_panels(t, count, n, 0); break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if BLOCK_ROWS > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
#undef CASE
}

/* `count` whole panels from the one at `t` on, of the run of rows whose packed blocks begin at t.x. */
static void compute_run(tile t, long count, long rows, int is_bfloat16) {
    long blocks = quotient_up(rows, BLOCK_ROWS), at_once = blocks == 1 ? count : 1;
    for (long panel = 0; panel < count; panel += at_once) {
        tile here = t;
        here.weights += panel * t.panel_bytes;
        here.bias = t.bias ? t.bias + panel * PANEL : NULL;
        for (long i = 0, begin = 0; i < blocks; i++) {
            long end = block_end(rows, blocks, i);
            here.out = t.out + begin * t.out_stride + panel * PANEL;
            compute_block(here, at_once, end - begin, is_bfloat16);
            here.x += (end - begin) * t.inputs;
            begin = end;
        }
    }
}

/* Panels [first, last) for all rows; outputs that are no whole panel go to `edge` (rows, PANEL). */
static void compute_product(const product *p, const float *x, float *edge, long first, long last) {
    long whole = smallest(last, p->outputs / PANEL), width = p->outputs % PANEL;
    float bias[PANEL] = {0};
    if (p->bias && last > whole)
        memcpy(bias, p->bias + whole * PANEL, sizeof(float) * (size_t)width);
    for (long t = 0; t < p->rows; t += RUN_BLOCKS * BLOCK_ROWS) {
        long rows = smallest(p->rows - t, RUN_BLOCKS * BLOCK_ROWS);
        for (long k = 0; k < p->inputs; k += run_inputs(p)) {
            long inputs = smallest(p->inputs - k, run_inputs(p)), panel_bytes = p->inputs * step_bytes(p);
            tile here = {x + t * p->inputs + k * rows, p->packed + first * panel_bytes + k * step_bytes(p), inputs,
                         panel_bytes, p->out + t * p->out_stride + first * PANEL, p->out_stride,
                         p->bias ? p->bias + first * PANEL : NULL, k == 0, k + inputs == p->inputs, p->rounded};
            compute_run(here, whole - first, rows, p->is_bfloat16);
            if (last > whole) {
                here.weights += (whole - first) * panel_bytes;
                here.out = edge + t * PANEL;
                here.out_stride = PANEL;
                here.bias = p->bias ? bias : NULL;
                compute_run(here, 1, rows, p->is_bfloat16);
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
            compute_product(p, p->rows > 1 ? scratch : p->x, scratch + p->rows * p->inputs, first, last);
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
