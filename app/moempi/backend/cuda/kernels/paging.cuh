// The cache row of a position: row position % PAGE_ROWS of page pages[position / PAGE_ROWS].
#pragma once
#include "rows.cuh"

const int PAGE_ROWS = 64;  // equals config.tensors.PAGE_ROWS

__device__ inline long long cache_row(const int* pages, int position) {
  return static_cast<long long>(pages[position / PAGE_ROWS]) * PAGE_ROWS + position % PAGE_ROWS;
}
