// Rotary position embedding (Su et al. 2021).
//
//   rope_angles        cosines and sines (T, n) of position times frequency, times `amplitude`      NumPy: rope_angles
//   rotate             out = x (T, H, dim), the first 2n numbers of a head rotated by the row's n angles
//                                                                                              NumPy: rotate
//   rotate_into_cache  out = rotate of queries (T, H, dim); cached keys[cache row of t] = rotate of keys[t], cached
//                      values[cache row of t] = values[t], both (key-value heads, dim)         NumPy: rotate_into_cache
//   rotate_into_latent_cache  out (T, H, kept + dim) = kept queries (T, H, kept), then rotate of queries (T, H, dim);
//                      cached keys[cache row of t] (kept + dim) the same of the keys' one head
//                                                                                       NumPy: rotate_into_latent_cache
//
// Shapes: x, queries, keys and values have strides in numbers, out is contiguous; spans (T, 2) as in kv_cache.cu.
// Launch: rope_angles ceil(T * n / 256) blocks of 256; the others (T, ceil(numbers of a row / 2048)) blocks of 128.
#include "paging.cuh"

extern "C" __global__ void rope_angles(const int* positions, const float* frequencies, float* cosines, float* sines,
                                       int rows, int pairs, float amplitude) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows * pairs) return;
  const float angle = static_cast<float>(positions[i / pairs]) * frequencies[i % pairs];
  cosines[i] = cosf(angle) * amplitude;
  sines[i] = sinf(angle) * amplitude;
}

// Rotate eight pairs of a head; number i is paired with i + n, or 2i with 2i + 1 if INTERLEAVED.
template <bool INTERLEAVED>
__device__ inline void rotate_eight(const row* from, const float* cosines, const float* sines, row* to, int eight,
                                    int pairs) {
  const int first = INTERLEAVED ? 16 * eight : 8 * eight, second = INTERLEAVED ? first + 8 : first + pairs;
  const Eight<row> held_first = read8(from + first), held_second = read8(from + second);
  const Eight<float> held_cosines = read8(cosines + 8 * eight), held_sines = read8(sines + 8 * eight);
  float numbers[16], rotated[16], cosine[8], sine[8];
  unpack8(held_first, numbers), unpack8(held_second, numbers + 8);
  unpack8(held_cosines, cosine), unpack8(held_sines, sine);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int a = INTERLEAVED ? 2 * i : i, b = INTERLEAVED ? 2 * i + 1 : i + 8;
    rotated[a] = numbers[a] * cosine[i] - numbers[b] * sine[i];
    rotated[b] = numbers[b] * cosine[i] + numbers[a] * sine[i];
  }
  store8(to + first, 8, rotated), store8(to + second, 8, rotated + 8);
}

__device__ inline void rotate_one(const row* from, const float* cosines, const float* sines, row* to, int pair,
                                  int pairs, int interleaved) {
  const int first = interleaved ? 2 * pair : pair, second = interleaved ? first + 1 : pair + pairs;
  const float a = widen(from[first]), b = widen(from[second]);
  narrow(a * cosines[pair] - b * sines[pair], to + first);
  narrow(b * cosines[pair] + a * sines[pair], to + second);
}

// A thread rotates eight pairs or copies eight numbers at a time; one where n or a stride is no multiple of eight.
__device__ inline bool is_by_eights(const row* x, long long head_stride, int dim, int pairs) {
  return is_aligned(x) && head_stride % 8 == 0 && dim % 8 == 0 && pairs % 8 == 0;
}

// Rotate `size` pairs of a head, or copy `size` of the numbers behind its pairs; parts are numbered in this order.
__device__ inline void rotate_part(const row* from, const float* cosines, const float* sines, row* to, int part,
                                   int size, int pairs, int interleaved) {
  const int rotations = pairs / size, column = (part + rotations) * size;
  if (part < rotations && size == 1) rotate_one(from, cosines, sines, to, part, pairs, interleaved);
  else if (part < rotations && interleaved) rotate_eight<true>(from, cosines, sines, to, part, pairs);
  else if (part < rotations) rotate_eight<false>(from, cosines, sines, to, part, pairs);
  else copy8(from + column, to + column, size);
}

extern "C" __global__ void rotate(const row* x, const float* cosines, const float* sines, row* out, int heads, int dim,
                                  int pairs, long long token_stride, long long head_stride, int interleaved) {
  const long long token = blockIdx.x;
  x += token * token_stride, cosines += token * pairs, sines += token * pairs;
  const int size = is_by_eights(x, head_stride, dim, pairs) ? 8 : 1, parts = (dim - pairs) / size;
  for (int task = blockIdx.y * blockDim.x + threadIdx.x; task < heads * parts; task += gridDim.y * blockDim.x) {
    const int head = task / parts, part = task - head * parts;
    rotate_part(x + head * head_stride, cosines, sines, out + (token * heads + head) * dim, part, size, pairs,
                interleaved);
  }
}

extern "C" __global__ void rotate_into_cache(const row* queries, const row* keys, const row* values,
                                             const float* cosines, const float* sines, const int* spans,
                                             const int* pages, row* out, row* cached_keys, row* cached_values,
                                             int heads, int kv_heads, int dim, int pairs, long long query_stride,
                                             long long query_head_stride, long long key_stride,
                                             long long key_head_stride, long long value_stride,
                                             long long value_head_stride, int interleaved) {
  const long long token = blockIdx.x;
  const long long cached = cache_row(pages + spans[2 * token + 1], spans[2 * token]) * kv_heads * dim;
  queries += token * query_stride, keys += token * key_stride, values += token * value_stride;
  cosines += token * pairs, sines += token * pairs;
  out += token * heads * dim, cached_keys += cached, cached_values += cached;
  const bool by_eights = is_by_eights(queries, query_head_stride, dim, pairs) &&
                         is_by_eights(keys, key_head_stride, dim, pairs) &&
                         is_by_eights(values, value_head_stride, dim, pairs);
  const int size = by_eights ? 8 : 1, parts = (dim - pairs) / size, copies = dim / size;
  const int rotated = (heads + kv_heads) * parts, tasks = rotated + kv_heads * copies;
  for (int task = blockIdx.y * blockDim.x + threadIdx.x; task < tasks; task += gridDim.y * blockDim.x) {
    if (task >= rotated) {
      const int kv_head = (task - rotated) / copies, column = (task - rotated - kv_head * copies) * size;
      copy8(values + kv_head * value_head_stride + column, cached_values + kv_head * dim + column, size);
      continue;
    }
    const int head = task / parts, part = task - head * parts, kv_head = head - heads;
    const row* from = kv_head < 0 ? queries + head * query_head_stride : keys + kv_head * key_head_stride;
    row* to = kv_head < 0 ? out + head * dim : cached_keys + kv_head * dim;
    rotate_part(from, cosines, sines, to, part, size, pairs, interleaved);
  }
}

extern "C" __global__ void rotate_into_latent_cache(
    const row* kept_queries, const row* queries, const row* kept_keys, const row* keys, const float* cosines,
    const float* sines, const int* spans, const int* pages, row* out, row* cached_keys, int heads, int kept, int dim,
    int pairs, long long kept_query_stride, long long kept_query_head_stride, long long query_stride,
    long long query_head_stride, long long kept_key_stride, long long key_stride, int interleaved) {
  const long long token = blockIdx.x;
  const int width = kept + dim;
  kept_queries += token * kept_query_stride, queries += token * query_stride;
  kept_keys += token * kept_key_stride, keys += token * key_stride;
  cosines += token * pairs, sines += token * pairs;
  out += token * heads * width, cached_keys += cache_row(pages + spans[2 * token + 1], spans[2 * token]) * width;
  const bool by_eights = is_by_eights(kept_queries, kept_query_head_stride, kept, 0) &&
                         is_by_eights(queries, query_head_stride, dim, pairs) && is_by_eights(kept_keys, 0, kept, 0) &&
                         is_by_eights(keys, 0, dim, pairs);
  const int size = by_eights ? 8 : 1, copies = kept / size, parts = copies + (dim - pairs) / size;
  for (int task = blockIdx.y * blockDim.x + threadIdx.x; task < (heads + 1) * parts; task += gridDim.y * blockDim.x) {
    const int head = task / parts, part = task - head * parts;
    const row* copied = head < heads ? kept_queries + head * kept_query_head_stride : kept_keys;
    const row* rotated = head < heads ? queries + head * query_head_stride : keys;
    row* to = head < heads ? out + head * width : cached_keys;
    if (part < copies) copy8(copied + part * size, to + part * size, size);
    else rotate_part(rotated, cosines, sines, to + kept, part - copies, size, pairs, interleaved);
  }
}
