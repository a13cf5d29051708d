/* What one core can do at most: multiply-adds on registers, products of bfloat16 pairs and tiles, and reading memory. */
#include "tiles.h"

#define SUMS (LANES == 8 ? 12 : 24) /* independent chains, which fill the pipelines of the units */

/* Compute `rounds` rounds of SUMS operations; returns the floating-point operations. */
double multiply_and_add(long rounds, float a, float b, float *out) {
    vec sums[SUMS], x = set1(a), y = set1(b);
    for (int i = 0; i < SUMS; i++)
        sums[i] = set1((float)i);
    for (long r = 0; r < rounds; r++)
        for (int i = 0; i < SUMS; i++)
            sums[i] = fused(x, y, sums[i]);
    for (int i = 0; i < SUMS; i++)
        store(out, add(load(out), sums[i]));
    return 2.0 * LANES * SUMS * (double)rounds;
}

/* The same with pairs of bfloat16 numbers; 0 without such products. */
double multiply_and_add_pairs(long rounds, float a, float b, float *out) {
    vec sums[SUMS], x = set1(a), y = set1(b);
    for (int i = 0; i < SUMS; i++)
        sums[i] = set1((float)i);
    for (long r = 0; r < rounds; r++)
        for (int i = 0; i < SUMS; i++)
            sums[i] = fused_pairs(x, y, sums[i]);
    for (int i = 0; i < SUMS; i++)
        store(out, add(load(out), sums[i]));
    return HAS_PAIRS * 4.0 * LANES * SUMS * (double)rounds;
}

/* The same with tiles of `values` (2, 2, TILE_ROWS, TILE_INPUTS), rows and weights; 0 without tiles. */
double multiply_tiles(long rounds, const uint16_t *values, float *out) {
#if HAS_TILES
    if (!rounds) /* the system may refuse tiles */
        return 0;
    _Alignas(64) tile_shapes shapes = {.palette = 1};
    for (int t = 0; t < NUM_TILES; t++)
        shapes.rows[t] = TILE_ROWS, shapes.row_bytes[t] = TILE_INPUTS * 2;
    TILE_SHAPES(&shapes);
    TILE_LOAD(4, values, TILE_INPUTS * 2);
    TILE_LOAD(5, values + TILE_ROWS * TILE_INPUTS, TILE_INPUTS * 2);
    TILE_LOAD(6, values + 2 * TILE_ROWS * TILE_INPUTS, TILE_INPUTS * 2);
    TILE_LOAD(7, values + 3 * TILE_ROWS * TILE_INPUTS, TILE_INPUTS * 2);
    for (long r = 0; r < rounds; r++) {
        TILE_MULTIPLY(0, 4, 6);
        TILE_MULTIPLY(1, 4, 7);
        TILE_MULTIPLY(2, 5, 6);
        TILE_MULTIPLY(3, 5, 7);
    }
    TILE_STORE(0, out, TILE_OUTPUTS * 4);
    TILE_RELEASE();
    return 8.0 * TILE_ROWS * TILE_OUTPUTS * TILE_INPUTS * (double)rounds;
#else
    (void)rounds, (void)values, (void)out;
    return 0;
#endif
}

/* Read `count` numbers, a multiple of 8 LANES; returns their bytes. */
double read_numbers(const float *numbers, long count, float *out) {
    vec sums[8];
    for (int i = 0; i < 8; i++)
        sums[i] = set1(0);
    for (long n = 0; n < count; n += 8 * LANES)
        for (int i = 0; i < 8; i++)
            sums[i] = add(sums[i], load(numbers + n + i * LANES));
    for (int i = 0; i < 8; i++)
        store(out, add(load(out), sums[i]));
    return 4.0 * (double)count;
}
