/* Numbers by which products of the processor are tried, before they are used in the place of others. */
#pragma once
#include "simd.h"

#define RANGES 5
/* The lowest exponent and how many there are, of factors and of sums: numbers near and far from each other, the largest,
 * and the smallest with subnormal ones. */
static const long exponents[RANGES][4] = {
    {127, 6, 127, 12}, {100, 60, 100, 100}, {187, 8, 247, 8}, {0, 130, 0, 130}, {60, 8, 0, 16}};

/* A number with random sign and bits, whose exponent is one of `count` from `first` on; of bfloat16 without low bits. */
static inline uint32_t random_bits(uint64_t *state, long first, long count, int is_bfloat16) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    uint32_t bits = (uint32_t)(*state >> 32), low = (uint32_t)*state >> 8 & 0xFFFF;
    return (bits & (is_bfloat16 ? 0x807F0000u : 0x807FFFFFu)) | (uint32_t)(first + low % count) << 23;
}

/* Words of two bfloat16 factors, and sums, of trial number `trial`. */
static inline void try_pairs(uint64_t *state, long trial, uint32_t *words, long count) {
    const long *range = exponents[trial % RANGES];
    for (long i = 0; i < count; i++)
        words[i] = random_bits(state, range[0], range[1], 1) | random_bits(state, range[0], range[1], 1) >> 16;
}
static inline void try_sums(uint64_t *state, long trial, uint32_t *sums, long count) {
    const long *range = exponents[trial % RANGES];
    for (long i = 0; i < count; i++)
        sums[i] = random_bits(state, range[2], range[3], 0);
}

/* Two numbers that are none count as equal. */
static inline int same_bits(const float *a, const float *b, long count) {
    int same = 1;
    for (long i = 0; i < count; i++)
        same &= memcmp(a + i, b + i, sizeof(float)) == 0 || (a[i] != a[i] && b[i] != b[i]);
    return same;
}
