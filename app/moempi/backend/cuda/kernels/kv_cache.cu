// The paged key-value cache (pages * PAGE_ROWS, heads, width); paging.cuh maps a position to its cache row.
//
//   extend_cache   cache[cache row of t] = x[t] (heads, width)                              NumPy: extend_cache
//   clear_pages    cache[rows of the pages] = 0                                             NumPy: clear
//
// Shapes: x (T, heads, width) with strides; spans (T, 2): position of each row, and the index of its sequence's first
// page in `pages`. Launch: extend_cache as take_rows in packing.cu; clear_pages one block of 1,024 per page.
#include "paging.cuh"

extern "C" __global__ void extend_cache(const row* x, row* cache, const int* spans, const int* pages, int heads,
                                        int width, long long token_stride, long long head_stride) {
  const int* span = spans + 2 * static_cast<long long>(blockIdx.x);
  row* to = cache + cache_row(pages + span[1], span[0]) * heads * width;
  const row* from = x + blockIdx.x * token_stride;
  if (heads == 1 || head_stride == width) return copy_segment(from, to, blockIdx.y, heads * width);
  for (int column = blockIdx.y * blockDim.x + threadIdx.x; column < heads * width; column += gridDim.y * blockDim.x)
    to[column] = from[column / width * head_stride + column % width];
}

extern "C" __global__ void clear_pages(row* cache, const int* pages, long long page_numbers) {
  row* page = cache + pages[blockIdx.x] * page_numbers;
  const float zeros[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (long long at = threadIdx.x * 8; at < page_numbers; at += blockDim.x * 8) store8(page + at, page_numbers - at, zeros);
}
