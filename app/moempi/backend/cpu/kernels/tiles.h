/* Tiles: products of 16 rows and 16 outputs over 32 inputs, by the processor (AMX-BF16) or as it defines them.
 *
 *   c[m][n] += (sum over even k of a[m][k] * b[k][n]) + (sum over odd k of a[m][k] * b[k][n])       k < TILE_INPUTS
 *
 * Both sums are chains of fused multiply-adds that begin with 0, in the order of k; subnormal numbers count as zero
 * (Intel SDM, TDPBF16PS). So a row of c depends on that row of a and on b alone, not on the number of rows.
 */
#pragma once
#include "simd.h"

#define TILE_ROWS 16
#define TILE_OUTPUTS 16
#define TILE_INPUTS 32
#define TILE_WORDS (TILE_INPUTS / 2) /* of two inputs: in a row of a, and rows of b */
#define NUM_TILES 8

/* Rows, and bytes of a row, of each tile, as the processor reads them. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_shapes;

/* Add to `rows` rows of c, as defined; a and b are tiles one row after another. */
static inline void multiply_as_defined(float *c, const uint32_t *a, const uint32_t *b, long rows) {
    for (long r = 0; r < rows; r++) {
        group even = same(0), odd = same(0);
        for (int k = 0; k < TILE_WORDS; k++) {
            const ivec x = bits1(a[r * TILE_WORDS + k]);
            EACH(i) {
                const ivec w = load_bits(b + k * TILE_OUTPUTS + i * LANES);
                even.part[i] = fused(low_half(x), low_half(w), even.part[i]);
                odd.part[i] = fused(high_half(x), high_half(w), odd.part[i]);
            }
        }
        float *sums = c + r * TILE_OUTPUTS;
        EACH(i) store(sums + i * LANES, add(load(sums + i * LANES), add(even.part[i], odd.part[i])));
    }
}

#if defined(__AMX_BF16__) && !defined(WITHOUT_TILES) && !defined(TILES_AS_DEFINED)
#define HAS_TILES 1
/* The compiler's functions do not tell it which memory they read and write. */
#define IN_MEMORY(action) \
    __asm__ volatile("" ::: "memory"); \
    action; \
    __asm__ volatile("" ::: "memory")
#define TILE_SHAPES(shapes) IN_MEMORY(_tile_loadconfig(shapes))
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, from, stride) IN_MEMORY(_tile_loadd(t, from, stride))
#define TILE_STORE(t, to, stride) IN_MEMORY(_tile_stored(t, to, stride))
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)
#define TILE_RELEASE() _tile_release()

#elif defined(TILES_AS_DEFINED) && LANES >= 8
#define HAS_TILES 1
static _Thread_local struct {
    uint8_t rows[NUM_TILES];
    uint32_t words[NUM_TILES][TILE_ROWS][TILE_WORDS];
} tiles;

#define TILE_SHAPES(shapes) memcpy(tiles.rows, (shapes)->rows, NUM_TILES)
#define TILE_ZERO(t) memset(tiles.words[t], 0, sizeof tiles.words[t])
#define TILE_LOAD(t, from, stride) tile_load(t, (const char *)(from), stride)
#define TILE_STORE(t, to, stride) tile_store(t, (char *)(to), stride)
#define TILE_MULTIPLY(c, a, b) \
    multiply_as_defined((float *)tiles.words[c], tiles.words[a][0], tiles.words[b][0], tiles.rows[c])
#define TILE_RELEASE() TILE_ZERO(0)

static inline void tile_load(int t, const char *from, long stride) {
    for (int r = 0; r < tiles.rows[t]; r++)
        memcpy(tiles.words[t][r], from + r * stride, sizeof tiles.words[t][r]);
}
static inline void tile_store(int t, char *to, long stride) {
    for (int r = 0; r < tiles.rows[t]; r++)
        memcpy(to + r * stride, tiles.words[t][r], sizeof tiles.words[t][r]);
}
#else
#define HAS_TILES 0
#endif
