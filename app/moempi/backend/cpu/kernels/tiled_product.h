/* Products of rows of bfloat16 values with TILED matrices, which product.c divides into tasks. */
#pragma once
#include "kernels.h"
#include "tiles.h"
#include <stdint.h>

#if HAS_TILES

/* Numbers of a packed row of a product of `inputs` inputs. */
long tiled_inputs(long inputs);

/* Pack `count` rows of x from row `first` on, a multiple of 16, into `to`, the packed rows of the whole product. */
void pack_tiled(const product *p, uint16_t *to, long first, long count);

/* Compute the panels [first, last) for all rows, from packed ones; `edge` is memory for (rows, panel_outputs()). */
void multiply_tiled(const product *p, const uint16_t *x, float *edge, long first, long last);

#else /* no product is computed so */
static inline long tiled_inputs(long inputs) { return inputs; }
static inline void pack_tiled(const product *p, uint16_t *to, long first, long count) {
    (void)p, (void)to, (void)first, (void)count;
}
static inline void multiply_tiled(const product *p, const uint16_t *x, float *edge, long first, long last) {
    (void)p, (void)x, (void)edge, (void)first, (void)last;
}
#endif
