/* Products of bfloat16 rows and a bfloat16 matrix, on processors with AVX512-BF16.
 *
 *   out[t, n] = round( sum over k of x[t, k] * w[k, n] )        x (T, K), w (K, N), out (T, N)
 *
 * Sums accumulate in float32, in pairs of ascending k: the bits of a row do not depend on the other rows of the call.
 * The matrix is packed once into panels of PANEL outputs, with zeros beyond N and beyond an odd K:
 *   packed[n / PANEL][k / 2][n % PANEL][k % 2]
 * x is float32 that holds bfloat16 values; `pairs` is scratch memory for T * ceil(K / 2) pairs of them.
 * `rounded` is 1 to round the result to bfloat16 values (ties to even, stored as float32), 0 to keep float32.
 *
 * NumPy twin: `NumpyBackend._product` without `reproducible`.
 */
#include <immintrin.h>
#include <stdint.h>

#define FLOATS 16
#define VECTORS 4
#define PANEL (FLOATS * VECTORS)
#define ROWS 6
#define CACHED_PAIRS (1L << 16)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

int supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
}

/* Pack w, (N, K) or (K, N) if `transposed`, into outputs [first, first + N) of `packed`. */
void pack(const uint16_t *w, uint16_t *packed, long inputs, long outputs, long first, int transposed) {
    long num_pairs = (inputs + 1) / 2;
    for (long n = 0; n < outputs; n++) {
        long output = first + n;
        uint16_t *column = packed + (output / PANEL * num_pairs * PANEL + output % PANEL) * 2;
        for (long k = 0; k < inputs; k++)
            column[k / 2 * PANEL * 2 + k % 2] = transposed ? w[k * outputs + n] : w[n * inputs + k];
    }
}

static void pair_up(const float *x, uint32_t *pairs, long rows, long inputs) {
    const uint32_t *bits = (const uint32_t *)x;
    long whole = inputs / 2, num_pairs = (inputs + 1) / 2;
    for (long t = 0; t < rows; t++, bits += inputs, pairs += num_pairs) {
        for (long p = 0; p < whole; p++)
            pairs[p] = bits[2 * p] >> 16 | (bits[2 * p + 1] & 0xFFFF0000u);
        if (whole < num_pairs)
            pairs[whole] = bits[2 * whole] >> 16;
    }
}

TARGET static inline __m512 nearest_bfloat16(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xFFFF0000)));
}

/* `rows` rows, a constant after inlining, times one panel. */
TARGET static inline __attribute__((always_inline)) void block(
    const uint32_t *pairs, const uint16_t *panel, float *out, long num_pairs, long outputs, long width, int rounded,
    const int rows) {
    __m512 sums[ROWS][VECTORS];
    for (int t = 0; t < rows; t++)
        for (int v = 0; v < VECTORS; v++)
            sums[t][v] = _mm512_setzero_ps();
    for (long p = 0; p < num_pairs; p++, panel += PANEL * 2) {
        __m512bh weights[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            weights[v] = (__m512bh)_mm512_loadu_si512(panel + v * FLOATS * 2);
        for (int t = 0; t < rows; t++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32((int)pairs[t * num_pairs + p]);
            for (int v = 0; v < VECTORS; v++)
                sums[t][v] = _mm512_dpbf16_ps(sums[t][v], pair, weights[v]);
        }
    }
    for (int t = 0; t < rows; t++)
        for (int v = 0; v < VECTORS && v * FLOATS < width; v++) {
            long left = width - v * FLOATS;
            __mmask16 kept = left >= FLOATS ? 0xFFFF : (__mmask16)((1u << left) - 1);
            __m512 sum = rounded ? nearest_bfloat16(sums[t][v]) : sums[t][v];
            _mm512_mask_storeu_ps(out + t * outputs + v * FLOATS, kept, sum);
        }
}

TARGET static void product_of_few(
    const uint32_t *pairs, const uint16_t *packed, float *out, long rows, long num_pairs, long outputs, int rounded) {
    for (long n = 0; n < outputs; n += PANEL, packed += num_pairs * PANEL * 2) {
        long width = outputs - n < PANEL ? outputs - n : PANEL;
        long t = 0;
        for (; t + ROWS <= rows; t += ROWS)
            block(pairs + t * num_pairs, packed, out + t * outputs + n, num_pairs, outputs, width, rounded, ROWS);
        const uint32_t *rest = pairs + t * num_pairs;
        float *result = out + t * outputs + n;
        switch (rows - t) {
        case 1: block(rest, packed, result, num_pairs, outputs, width, rounded, 1); break;
        case 2: block(rest, packed, result, num_pairs, outputs, width, rounded, 2); break;
        case 3: block(rest, packed, result, num_pairs, outputs, width, rounded, 3); break;
        case 4: block(rest, packed, result, num_pairs, outputs, width, rounded, 4); break;
        case 5: block(rest, packed, result, num_pairs, outputs, width, rounded, 5); break;
        }
    }
}

/* Computed in runs of rows whose pairs fit in the second-level cache together with a panel. */
void product(
    const float *x, uint32_t *pairs, const uint16_t *packed, float *out, long rows, long inputs, long outputs,
    int rounded) {
    long num_pairs = (inputs + 1) / 2;
    long run = CACHED_PAIRS / (num_pairs > 0 ? num_pairs : 1) / ROWS * ROWS;
    if (run < 4 * ROWS)
        run = 4 * ROWS;
    for (long t = 0; t < rows; t += run) {
        long count = rows - t < run ? rows - t : run;
        pair_up(x + t * inputs, pairs, count, inputs);
        product_of_few(pairs, packed, out + t * outputs, count, num_pairs, outputs, rounded);
    }
}
