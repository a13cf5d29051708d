/* What one core can do at most: fused multiply-adds on registers, products of bfloat16 pairs, and reading memory. */
#include "simd.h"

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

/* Read `count` numbers, a multiple of 8 LANES. */
void read_numbers(const float *numbers, long count, float *out) {
    vec sums[8];
    for (int i = 0; i < 8; i++)
        sums[i] = set1(0);
    for (long n = 0; n < count; n += 8 * LANES)
        for (int i = 0; i < 8; i++)
            sums[i] = add(sums[i], load(numbers + n + i * LANES));
    for (int i = 0; i < 8; i++)
        store(out, add(load(out), sums[i]));
}
