// Small layers of a transformer on float32 rows: RMSNorm, SwiGLU's silu(gate) * up, and rotary positions. Each reads a
// row from memory once; PyTorch runs four to eight operations over the whole tensor. The code is compiled once per
// instruction set, in simd/layers.cpp.
#pragma once

#include <cstdint>

#include "simd_level.h"

namespace balcaprl {

struct LayerTable {
  // Writes out = x * rstd * weight and returns rstd = 1 / sqrt(mean(x^2) + eps).
  float (*rms_norm)(const float* x, const float* weight, int64_t size, double eps, float* out);
  // Writes grad_x of a row from the gradient of its output; adds grad * x * rstd to weight_sums unless that is null.
  void (*rms_norm_backward)(const float* grad, const float* x, const float* weight, int64_t size, float rstd,
                            float* grad_x, float* weight_sums);
  // Writes out = silu(gate) * up.
  void (*silu_mul)(const float* gate, const float* up, int64_t size, float* out);
  // Writes the gradients of gate and up from the gradient of out.
  void (*silu_mul_backward)(const float* grad, const float* gate, const float* up, int64_t size, float* grad_gate,
                            float* grad_up);
  // Writes out = x * cos + [-x2, x1] * sin for a head x = [x1, x2]; x, cos and sin have 2 * half numbers each. With
  // `turn_back` it multiplies by the transposed matrix instead, which turns the gradient of out into that of x.
  void (*rotate)(const float* x, const float* cos, const float* sin, int64_t half, bool turn_back, float* out);
};

BALCAPRL_SIMD_TABLES(LayerTable, layer_table)

inline const LayerTable& layer_table() { return BALCAPRL_SIMD_CHOOSE(layer_table); }

}  // namespace balcaprl
