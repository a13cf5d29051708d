// Where positions of a sequence lie in a paged cache.
#pragma once
#include "rows.cuh"

const int PAGE_ROWS = 64;  // as config.tensors.PAGE_ROWS

__device__ inline long long cache_row(const int* pages, int position) {
  return static_cast<long long>(pages[position / PAGE_ROWS]) * PAGE_ROWS + position % PAGE_ROWS;
}
