// The rotation of one pair of a head: number i with i + n of its first 2n, or 2i with 2i + 1 if `interleaved`.
#pragma once
#include "rows.cuh"

__device__ inline int first_of_pair(int pair, int interleaved) { return interleaved ? 2 * pair : pair; }
__device__ inline int second_of_pair(int pair, int pairs, int interleaved) {
  return interleaved ? 2 * pair + 1 : pair + pairs;
}

__device__ inline float rotated_first(float a, float b, float cosine, float sine) { return a * cosine - b * sine; }
__device__ inline float rotated_second(float a, float b, float cosine, float sine) { return b * cosine + a * sine; }

// Number `column` of a head whose first 2 * pairs numbers are rotated, as it would be stored.
__device__ inline float rotated_number(const row* head, const float* cosines, const float* sines, int column, int pairs,
                                       int interleaved) {
  if (column >= 2 * pairs) return widen(head[column]);
  const int pair = interleaved ? column / 2 : column % pairs;
  const bool is_first = column == first_of_pair(pair, interleaved);
  const float a = widen(head[first_of_pair(pair, interleaved)]);
  const float b = widen(head[second_of_pair(pair, pairs, interleaved)]);
  return stored(is_first ? rotated_first(a, b, cosines[pair], sines[pair])
                         : rotated_second(a, b, cosines[pair], sines[pair]));
}
