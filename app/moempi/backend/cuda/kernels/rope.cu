// Rotary position embedding (Su et al. 2021).
//
//   rope_angles        cosines and sines (T, n) of position times frequency, times `amplitude`      NumPy: rope_angles
//   rotate             out = x (T, H, dim), the first 2n numbers of a head rotated by the row's n angles
//                                                                                              NumPy: rotate
//   rotate_into_cache  out = rotate of queries (T, H, dim); cached keys[cache row of t] = rotate of keys[t], cached
//                      values[cache row of t] = values[t], both (key-value heads, dim); with weights of norms, heads
//                      of queries and keys are normalized first, as by rms_norm in norm.cu     NumPy: rotate_into_cache
//   extend_latent_cache  cached keys[cache row of t] (kept + dim) = kept keys (T, kept), normalized as by rms_norm, then
//                      rotate of keys (T, dim); unless null, out (T, N) = rms_norm of queries (T, N)
//                                                                                              NumPy: extend_latent_cache
//
// Shapes: x, queries, keys and values have strides in numbers, out is contiguous; spans (T, 2) as in kv_cache.cu.
// Launch: rope_angles ceil(T * n / 256) blocks of 256; rotate_into_cache (T, ceil((H + 2 key-value heads) / together))
// blocks of 128, each of which has up to `together` heads; extend_latent_cache (T, 2) blocks of the threads of rms_norm of
// N numbers, or (T, 1) blocks of whole warps without queries; rotate (T, ceil(numbers of a row / 2048)) blocks of 128.
#include "norm.cuh"
#include "paging.cuh"
#include "rotation.cuh"

extern "C" __global__ void rope_angles(const int* positions, const float* frequencies, float* cosines, float* sines,
                                       int rows, int pairs, float amplitude) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows * pairs) return;
  const float angle = static_cast<float>(positions[i / pairs]) * frequencies[i % pairs];
  cosines[i] = cosf(angle) * amplitude;
  sines[i] = sinf(angle) * amplitude;
}

// How a head is normalized: its numbers times `factor`, rounded or not, times `weight`, rounded; not at all without a
// weight.
struct HeadNorm {
  const norm_weight* weight;
  float factor;
  int rounded;
};

// Normalize the first `left` of eight numbers of a head, from `column` on.
__device__ inline void normalize8(float* numbers, const HeadNorm& norm, int column, int left) {
  if (!norm.weight) return;
  float weights[8];
  load8(norm.weight + column, left, weights);
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float normalized = numbers[n] * norm.factor;
    numbers[n] = stored((norm.rounded ? stored(normalized) : normalized) * weights[n]);
  }
}

// Rotate eight pairs of a head; number i is paired with i + n, or 2i with 2i + 1 if INTERLEAVED.
template <bool INTERLEAVED>
__device__ inline void rotate_eight(const row* from, const float* cosines, const float* sines, row* to, int eight,
                                    int pairs, const HeadNorm& norm) {
  const int first = INTERLEAVED ? 16 * eight : 8 * eight, second = INTERLEAVED ? first + 8 : first + pairs;
  const Eight<row> held_first = read8(from + first), held_second = read8(from + second);
  const Eight<float> held_cosines = read8(cosines + 8 * eight), held_sines = read8(sines + 8 * eight);
  float numbers[16], rotated[16], cosine[8], sine[8];
  unpack8(held_first, numbers), unpack8(held_second, numbers + 8);
  unpack8(held_cosines, cosine), unpack8(held_sines, sine);
  normalize8(numbers, norm, first, 8), normalize8(numbers + 8, norm, second, 8);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int a = INTERLEAVED ? 2 * i : i, b = INTERLEAVED ? 2 * i + 1 : i + 8;
    rotated[a] = rotated_first(numbers[a], numbers[b], cosine[i], sine[i]);
    rotated[b] = rotated_second(numbers[a], numbers[b], cosine[i], sine[i]);
  }
  store8(to + first, 8, rotated), store8(to + second, 8, rotated + 8);
}

__device__ inline void rotate_one(const row* from, const float* cosines, const float* sines, row* to, int pair,
                                  int pairs, int interleaved, const HeadNorm& norm) {
  const int first = first_of_pair(pair, interleaved), second = second_of_pair(pair, pairs, interleaved);
  float a[8] = {widen(from[first])}, b[8] = {widen(from[second])};
  normalize8(a, norm, first, 1), normalize8(b, norm, second, 1);
  narrow(rotated_first(a[0], b[0], cosines[pair], sines[pair]), to + first);
  narrow(rotated_second(a[0], b[0], cosines[pair], sines[pair]), to + second);
}

__device__ inline void copy_numbers(const row* from, row* to, int column, int count, const HeadNorm& norm) {
  if (!norm.weight) return copy8(from + column, to + column, count);
  float numbers[8];
  load8(from + column, count, numbers);
  normalize8(numbers, norm, column, count);
  store8(to + column, count, numbers);
}

// A thread rotates eight pairs or copies eight numbers at a time; one where n or a stride is no multiple of eight.
__device__ inline bool is_by_eights(const row* x, long long head_stride, int dim, int pairs) {
  return is_aligned(x) && head_stride % 8 == 0 && dim % 8 == 0 && pairs % 8 == 0;
}

// Rotate `size` pairs of a head, or copy `size` of the numbers behind its pairs; parts are numbered in this order.
__device__ inline void rotate_part(const row* from, const float* cosines, const float* sines, row* to, int part,
                                   int size, int pairs, int interleaved, const HeadNorm& norm) {
  const int rotations = pairs / size;
  if (part >= rotations) copy_numbers(from, to, (part + rotations) * size, size, norm);
  else if (size == 1) rotate_one(from, cosines, sines, to, part, pairs, interleaved, norm);
  else if (interleaved) rotate_eight<true>(from, cosines, sines, to, part, pairs, norm);
  else rotate_eight<false>(from, cosines, sines, to, part, pairs, norm);
}

// The factor of a head's norm, for all lanes of a warp; the sum is that of a warp of rms_norm.
__device__ inline float norm_factor(const row* head, int dim, float eps) {
  float squares = 0.0f;
  for (int column = threadIdx.x % WARP_THREADS * 8; column < dim; column += WARP_THREADS * 8) {
    float numbers[8];
    load8(head + column, dim - column, numbers);
#pragma unroll
    for (int n = 0; n < 8; ++n) squares += numbers[n] * numbers[n];
  }
  return rsqrtf(__fdividef(warp_sum(squares), dim) + eps);
}

extern "C" __global__ void rotate(const row* x, const float* cosines, const float* sines, row* out, int heads, int dim,
                                  int pairs, long long token_stride, long long head_stride, int interleaved) {
  const long long token = blockIdx.x;
  x += token * token_stride, cosines += token * pairs, sines += token * pairs;
  const int size = is_by_eights(x, head_stride, dim, pairs) ? 8 : 1, parts = (dim - pairs) / size;
  for (int task = blockIdx.y * blockDim.x + threadIdx.x; task < heads * parts; task += gridDim.y * blockDim.x) {
    const int head = task / parts, part = task - head * parts;
    rotate_part(x + head * head_stride, cosines, sines, out + (token * heads + head) * dim, part, size, pairs,
                interleaved, {nullptr, 0.0f, 0});
  }
}

const int MOST_TOGETHER = 64;  // equals MOST_HEADS of cuda/attention.py

extern "C" __global__ void rotate_into_cache(
    const row* queries, const row* keys, const row* values, const norm_weight* query_norm, const norm_weight* key_norm,
    const float* cosines, const float* sines, const int* spans, const int* pages, row* out, row* cached_keys,
    row* cached_values, int heads, int kv_heads, int dim, int pairs, long long query_stride,
    long long query_head_stride, long long key_stride, long long key_head_stride, long long value_stride,
    long long value_head_stride, int together, int interleaved, float eps, int rounded) {
  __shared__ float factors[MOST_TOGETHER];
  const long long token = blockIdx.x;
  if (spans[2 * token] < 0) return;  // no row
  const long long cached = cache_row(pages + spans[2 * token + 1], spans[2 * token]) * kv_heads * dim;
  queries += token * query_stride, keys += token * key_stride, values += token * value_stride;
  cosines += token * pairs, sines += token * pairs;
  out += token * heads * dim, cached_keys += cached, cached_values += cached;
  // The block's heads are from `first` on, in the order of queries, keys and values.
  const int first = blockIdx.y * together, own_heads = min(together, heads + 2 * kv_heads - first);
  const int own_rotated = max(0, min(own_heads, heads + kv_heads - first));
  if (query_norm) {
    for (int own = threadIdx.x / WARP_THREADS; own < own_rotated; own += blockDim.x / WARP_THREADS) {
      const int head = first + own, kv_head = head - heads;
      const row* from = kv_head < 0 ? queries + head * query_head_stride : keys + kv_head * key_head_stride;
      const float factor = norm_factor(from, dim, eps);
      if (threadIdx.x % WARP_THREADS == 0) factors[own] = factor;
    }
    __syncthreads();
  }
  const bool by_eights = is_by_eights(queries, query_head_stride, dim, pairs) &&
                         is_by_eights(keys, key_head_stride, dim, pairs) &&
                         is_by_eights(values, value_head_stride, dim, pairs);
  const int size = by_eights ? 8 : 1, parts = (dim - pairs) / size, copies = dim / size;
  const int rotated = own_rotated * parts, tasks = rotated + (own_heads - own_rotated) * copies;
  for (int task = threadIdx.x; task < tasks; task += blockDim.x) {
    if (task >= rotated) {
      const int own = (task - rotated) / copies, column = (task - rotated - own * copies) * size;
      const int kv_head = first + own_rotated + own - heads - kv_heads;
      copy8(values + kv_head * value_head_stride + column, cached_values + kv_head * dim + column, size);
      continue;
    }
    const int own = task / parts, head = first + own, kv_head = head - heads;
    const row* from = kv_head < 0 ? queries + head * query_head_stride : keys + kv_head * key_head_stride;
    row* to = kv_head < 0 ? out + head * dim : cached_keys + kv_head * dim;
    const HeadNorm norm = {kv_head < 0 ? query_norm : key_norm, query_norm ? factors[own] : 0.0f, rounded};
    rotate_part(from, cosines, sines, to, task - own * parts, size, pairs, interleaved, norm);
  }
}

extern "C" __global__ void extend_latent_cache(
    const row* queries, const row* kept_keys, const row* keys, const norm_weight* query_norm,
    const norm_weight* key_norm, const float* cosines, const float* sines, const int* spans, const int* pages, row* out,
    row* cached_keys, int query_dim, int kept, int dim, int pairs, long long query_stride, long long kept_stride,
    long long key_stride, int interleaved, float query_eps, float key_eps) {
  const long long token = blockIdx.x;
  if (spans[2 * token] < 0) return;  // no row
  if (blockIdx.y == 1) {
    normalize_vector(queries + token * query_stride, query_norm, out + token * query_dim, query_dim, query_eps, 1);
    return;
  }
  kept_keys += token * kept_stride, keys += token * key_stride, cosines += token * pairs, sines += token * pairs;
  cached_keys += cache_row(pages + spans[2 * token + 1], spans[2 * token]) * (kept + dim);
  const bool by_eights = is_by_eights(kept_keys, 0, kept, 0) && is_by_eights(keys, 0, dim, pairs);
  const int size = by_eights ? 8 : 1, copies = kept / size, parts = copies + (dim - pairs) / size;
  const HeadNorm norm = {key_norm, norm_factor(kept_keys, kept, key_eps), 1}, plain = {nullptr, 0.0f, 0};
  for (int part = threadIdx.x; part < parts; part += blockDim.x)
    if (part < copies) copy_numbers(kept_keys, cached_keys, part * size, size, norm);
    else rotate_part(keys, cosines, sines, cached_keys + kept, part - copies, size, pairs, interleaved, plain);
}
