// The SwiGLU of eight numbers, shared by the kernels that end with it.
#pragma once
#include "rows.cuh"

// NaN stays NaN, which fminf and fmaxf would hide.
__device__ inline float clamped(float number, float least, float most) {
  return number > most ? most : number < least ? least : number;
}

// gates = silu(gates) * ups; if alpha is not 0, the clamped form of config.architecture.Clamp.
__device__ inline void swiglu8(float* gates, float* ups, float alpha, float limit) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float exponent = gates[i];
    if (alpha != 0.0f) {
      gates[i] = clamped(gates[i], -infinity(), limit);
      ups[i] = clamped(ups[i], -limit, limit) + 1.0f;
      exponent = gates[i] * alpha;
    }
    gates[i] = __fdividef(gates[i], 1.0f + expf(-exponent)) * ups[i];
  }
}
