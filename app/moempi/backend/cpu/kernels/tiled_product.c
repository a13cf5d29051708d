/* Products of rows of bfloat16 values with packed matrices by tiles (tiles.h).
 *
 *   out[t, n] = round( bias[n] + sum over chunks of (sum over even k of a chunk + sum over odd k of it) )
 *
 * A chunk has TILE_INPUTS inputs; a product is x[t, k] * w[k, n]. The bits of an output depend on the row and the
 * weights alone, but they are others than those of the chain of product.c.
 *
 * Matrices are packed as by product.c: TILE_WORDS rows of a panel are one or two tiles of weights. Rows are packed in
 * tiles, as [t / TILE_ROWS][k / TILE_INPUTS][t % TILE_ROWS][k % TILE_INPUTS]. A block of two tiles of rows and a panel,
 * or of one tile of rows and two panels, keeps its sums in four tiles.
 *
 * NumPy twin: `tiled_product` of tests/backend/cpu/test_tiles.py.
 */
#include "tiled_product.h"
#include "tiles.h"
#include "trials.h"
#include <sys/syscall.h>
#include <unistd.h>

#if HAS_TILES

#define PANEL (2 * LANES)
#define PANEL_TILES (PANEL / TILE_OUTPUTS)
#define BLOCK_ROWS (2 * TILE_ROWS)
#define RUN_ROWS 512 /* packed rows and weights of a run fit in the second-level cache, its weights in the first */
#define RUN_CHUNKS 16
#define CHUNK_BYTES (TILE_WORDS * PANEL * 4)
#define PREFETCH_BYTES (2 * CHUNK_BYTES)

/* Numbers of tiles: SUMS_10 of the second rows and the first weights. */
#define SUMS_00 0
#define SUMS_01 1
#define SUMS_10 2
#define SUMS_11 3
#define ROWS_0 4
#define ROWS_1 5
#define WEIGHTS_0 6
#define WEIGHTS_1 7

/* A block of rows and adjacent panels, over a run of chunks. */
typedef struct {
    const uint16_t *x[2]; /* its tiles of rows */
    long rows[2];         /* of these tiles; the second may have none */
    const char *packed;
    long panels, panel_bytes;
    long first_chunk, chunks, last_words; /* of the run; the words of its last chunk */
    float *out;
    long out_stride;
    const float *bias;
    int starts, ends, rounded;
    int prefetches; /* weights: the first block that reads them */
} block;

long tiled_inputs(long inputs) { return (inputs + TILE_INPUTS - 1) / TILE_INPUTS * TILE_INPUTS; }

void pack_tiled(const product *p, uint16_t *to, long first, long count) {
    long inputs = tiled_inputs(p->inputs);
    for (long t = first; t < first + count; t++) {
        long tile = t / TILE_ROWS * TILE_ROWS, width = smallest(TILE_ROWS, p->rows - tile) * TILE_INPUTS;
        const float *from = p->x + (p->index ? p->index[t] : t) * p->x_stride;
        uint16_t *row = to + tile * inputs + (t - tile) * TILE_INPUTS;
        for (long k0 = 0; k0 < p->inputs; k0 += TILE_INPUTS, row += width) {
            float rest[TILE_INPUTS] = {0};
            const float *numbers = from + k0;
            if (k0 + TILE_INPUTS > p->inputs)
                numbers = memcpy(rest, numbers, sizeof(float) * (size_t)(p->inputs - k0));
            for (int i = 0; i < TILE_INPUTS; i += LANES)
                store_halves(row + i, right(load_bits(numbers + i), 16));
        }
    }
}

/* The weights of a chunk of a panel; those of a last, shorter one are copied to `padded`, with zeros behind. */
static inline const char *weights_of(const block *b, long panel, long chunk, char *padded) {
    const char *weights = b->packed + panel * b->panel_bytes + chunk * CHUNK_BYTES;
    if (b->prefetches)
        for (int line = 0; line < CHUNK_BYTES; line += 64)
            __builtin_prefetch(weights + PREFETCH_BYTES + line);
    if (chunk < b->chunks - 1 || b->last_words == TILE_WORDS)
        return weights;
    memset(padded, 0, CHUNK_BYTES);
    return memcpy(padded, weights, (size_t)(b->last_words * PANEL * 4));
}

/* Add the products of the rows in ROWS_0, and of those in ROWS_1 if there are `two` tiles of rows. */
#define ADD_PANEL(weights, sums_0, sums_1, two) \
    TILE_LOAD(WEIGHTS_0, weights, PANEL * 4); \
    TILE_MULTIPLY(sums_0, ROWS_0, WEIGHTS_0); \
    if (PANEL_TILES > 1) { \
        TILE_LOAD(WEIGHTS_1, (weights) + TILE_OUTPUTS * 4, PANEL * 4); \
        TILE_MULTIPLY(sums_1, ROWS_0, WEIGHTS_1); \
    } \
    if (two) { \
        TILE_MULTIPLY(SUMS_10, ROWS_1, WEIGHTS_0); \
        if (PANEL_TILES > 1) \
            TILE_MULTIPLY(SUMS_11, ROWS_1, WEIGHTS_1); \
    }

/* `two_rows`, whether there are two tiles of rows, and `two_panels` are constants after inlining; not both are true. */
INLINE void add_chunks(const block *b, const int two_rows, const int two_panels) {
    char padded[CHUNK_BYTES];
    for (long c = 0; c < b->chunks; c++) {
        TILE_LOAD(ROWS_0, b->x[0] + c * b->rows[0] * TILE_INPUTS, TILE_INPUTS * 2);
        if (two_rows) {
            TILE_LOAD(ROWS_1, b->x[1] + c * b->rows[1] * TILE_INPUTS, TILE_INPUTS * 2);
        }
        const char *weights = weights_of(b, 0, c, padded);
        ADD_PANEL(weights, SUMS_00, SUMS_01, two_rows)
        if (two_panels) {
            const char *second = weights_of(b, 1, c, padded);
            ADD_PANEL(second, SUMS_10, SUMS_11, 0)
        }
    }
}

/* `move` is TILE_LOAD or TILE_STORE. */
#define MOVE_SUMS(move, two_rows, two_panels) \
    move(SUMS_00, b->out, b->out_stride * 4); \
    if (PANEL_TILES > 1) { \
        move(SUMS_01, b->out + TILE_OUTPUTS, b->out_stride * 4); \
    } \
    if (two_rows || two_panels) { \
        float *second = b->out + (two_rows ? TILE_ROWS * b->out_stride : PANEL); \
        move(SUMS_10, second, b->out_stride * 4); \
        if (PANEL_TILES > 1) { \
            move(SUMS_11, second + TILE_OUTPUTS, b->out_stride * 4); \
        } \
    }

INLINE void compute(const block *b, const int two_rows, const int two_panels) {
    if (b->starts) {
        TILE_ZERO(SUMS_00);
        TILE_ZERO(SUMS_01);
        TILE_ZERO(SUMS_10);
        TILE_ZERO(SUMS_11);
    } else {
        MOVE_SUMS(TILE_LOAD, two_rows, two_panels)
    }
    add_chunks(b, two_rows, two_panels);
    MOVE_SUMS(TILE_STORE, two_rows, two_panels)
}

/* Add the bias to complete sums, and round them. */
static void finish(const block *b) {
    for (long t = 0; t < b->rows[0] + b->rows[1]; t++)
        for (long n = 0; n < b->panels * PANEL; n += LANES) {
            float *at = b->out + t * b->out_stride + n;
            vec sum = b->bias ? add(load(at), load(b->bias + n)) : load(at);
            store(at, b->rounded ? nearest_bfloat16(sum) : sum);
        }
}

static void compute_block(const block *b) {
    if (b->rows[1])
        compute(b, 1, 0);
    else
        b->panels > 1 ? compute(b, 0, 1) : compute(b, 0, 0);
    if (b->ends && (b->bias || b->rounded))
        finish(b);
}

/* Give the tiles the numbers of rows of a block. */
static void shape_tiles(const long *rows) {
    _Alignas(64) tile_shapes shapes = {.palette = 1};
    for (int t = 0; t < NUM_TILES; t++) {
        int is_second = rows[1] && (t == SUMS_10 || t == SUMS_11 || t == ROWS_1);
        shapes.rows[t] = (uint8_t)(t >= WEIGHTS_0 ? TILE_WORDS : rows[is_second]);
        shapes.row_bytes[t] = TILE_INPUTS * 2;
    }
    TILE_SHAPES(&shapes);
}

/* Ask the system to let this process use the tiles; whether it does, or it need not be asked. */
static int request_permission(void) {
#if defined(__AMX_BF16__)
    enum { TILE_DATA = 18, REQUEST = 0x1023 }; /* of the x86-64 system call arch_prctl */
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return 1;
#endif
}

/* Whether the processor has tiles as they are defined, which is tried, and the system lets this process use them. */
int request_tiles(void) {
    enum { TRIES = 40 * RANGES, WORDS = TILE_ROWS * TILE_WORDS };
    static const long rows[2] = {TILE_ROWS, 0};
    if (!request_permission())
        return 0;
    uint64_t state = 1;
    long before = flush_subnormals();
    int as_defined = 1;
    shape_tiles(rows);
    for (long i = 0; i < TRIES; i++) {
        uint32_t x[WORDS], w[WORDS], sums[WORDS], found[WORDS];
        try_pairs(&state, i, x, WORDS);
        try_pairs(&state, i, w, WORDS);
        try_sums(&state, i, sums, WORDS);
        TILE_LOAD(SUMS_00, sums, TILE_OUTPUTS * 4);
        TILE_LOAD(ROWS_0, x, TILE_INPUTS * 2);
        TILE_LOAD(WEIGHTS_0, w, TILE_INPUTS * 2);
        TILE_MULTIPLY(SUMS_00, ROWS_0, WEIGHTS_0);
        TILE_STORE(SUMS_00, found, TILE_OUTPUTS * 4);
        multiply_as_defined((float *)sums, x, w, TILE_ROWS);
        as_defined &= same_bits((const float *)found, (const float *)sums, WORDS);
    }
    TILE_RELEASE();
    restore_subnormals(before);
    return as_defined;
}

/* Rows [first, last) in blocks, each as `b` but for its rows. Tiles have the shapes of a block of `shaped` rows. */
static void compute_rows(const product *p, block b, const uint16_t *x, long first, long last, long *shaped) {
    for (long t = first; t < last; t += BLOCK_ROWS) {
        long rows = smallest(last - t, BLOCK_ROWS);
        b.rows[0] = smallest(rows, TILE_ROWS), b.rows[1] = rows - b.rows[0];
        for (int i = 0; i < 2; i++)
            b.x[i] = x + (t + i * TILE_ROWS) * tiled_inputs(p->inputs) + b.first_chunk * b.rows[i] * TILE_INPUTS;
        b.prefetches = t == first;
        if (rows != *shaped) {
            shape_tiles(b.rows);
            *shaped = rows;
        }
        compute_block(&b);
        b.out += BLOCK_ROWS * b.out_stride;
    }
}

/* The block of `panels` panels from `panel` on and the chunks [first, end), at row t, but for its rows.
 *
 * The results of a panel that is not whole go to `edge` (rows, PANEL); `edge_bias` (PANEL,) is its bias.
 */
static block block_at(const product *p, float *edge, const float *edge_bias, long t, long panel, long panels, long first,
                      long end) {
    long steps = (p->inputs + 1) / 2, is_edge = (panel + 1) * PANEL > p->outputs;
    block b = {.panels = panels, .panel_bytes = steps * PANEL * 4, .first_chunk = first, .chunks = end - first};
    b.packed = p->packed + panel * b.panel_bytes + first * CHUNK_BYTES;
    b.last_words = smallest(TILE_WORDS, steps - (end - 1) * TILE_WORDS);
    b.out = is_edge ? edge + t * PANEL : p->out + t * p->out_stride + panel * PANEL;
    b.out_stride = is_edge ? PANEL : p->out_stride;
    b.bias = !p->bias ? NULL : is_edge ? edge_bias : p->bias + panel * PANEL;
    b.starts = first == 0, b.ends = end * TILE_WORDS >= steps, b.rounded = p->rounded;
    return b;
}

void multiply_tiled(const product *p, const uint16_t *x, float *edge, long first, long last) {
    long chunks = tiled_inputs(p->inputs) / TILE_INPUTS, run = p->rows > BLOCK_ROWS ? RUN_CHUNKS : chunks;
    long whole = smallest(last, p->outputs / PANEL), width = p->outputs % PANEL;
    long most = p->rows <= TILE_ROWS ? 2 : 1, shaped = 0;
    float bias[PANEL] = {0};
    if (p->bias && last > whole)
        memcpy(bias, p->bias + whole * PANEL, sizeof(float) * (size_t)width);
    for (long t = 0; t < p->rows; t += RUN_ROWS)
        for (long c = 0; c < chunks; c += run)
            for (long panel = first, panels; panel < last; panel += panels) {
                panels = whole - panel >= most ? most : 1;
                block b = block_at(p, edge, bias, t, panel, panels, c, smallest(chunks, c + run));
                compute_rows(p, b, x, t, smallest(p->rows, t + RUN_ROWS), &shaped);
            }
    TILE_RELEASE();
    for (long t = 0; last > whole && t < p->rows; t++)
        memcpy(p->out + t * p->out_stride + whole * PANEL, edge + t * PANEL, sizeof(float) * (size_t)width);
}

#else
int request_tiles(void) { return 0; }
#endif
