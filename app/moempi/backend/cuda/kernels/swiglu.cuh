// The SwiGLU of one gate, shared by the kernels that end with it.
#pragma once
#include "rows.cuh"

// NaN stays NaN, which fminf and fmaxf would hide.
__device__ inline float clamped(float number, float least, float most) {
  return number > most ? most : number < least ? least : number;
}

// silu(gate) * up; if alpha is not 0, the clamped form of config.architecture.Clamp.
__device__ inline float swiglu_of(float gate, float up, float alpha, float limit) {
  float exponent = gate;
  if (alpha != 0.0f) {
    gate = clamped(gate, -infinity(), limit);
    up = clamped(up, -limit, limit) + 1.0f;
    exponent = gate * alpha;
  }
  return __fdividef(gate, 1.0f + expf(-exponent)) * up;
}
