// Elementwise layers of a transformer on float32 rows: RMSNorm, SwiGLU's silu(gate) * up, and rotary positions. One pass each where
// PyTorch's own operations take four to eight. Implemented once per instruction set in simd/layers.cpp.
#pragma once

#include <cstdint>

#include "simd_level.h"

namespace balcaprl {

struct LayerTable {
  // out = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps), which is returned.
  float (*rms_norm)(const float* x, const float* weight, int64_t size, double eps, float* out);
  // grad_x of a row from its output's gradient; adds grad * x * rstd to weight_sums unless that is null.
  void (*rms_norm_backward)(const float* grad, const float* x, const float* weight, int64_t size, float rstd,
                            float* grad_x, float* weight_sums);
  // out = silu(gate) * up.
  void (*silu_mul)(const float* gate, const float* up, int64_t size, float* out);
  void (*silu_mul_backward)(const float* grad, const float* gate, const float* up, int64_t size, float* grad_gate,
                            float* grad_up);
  // out = x * cos + [-x2, x1] * sin for a head x = [x1, x2] of 2 * half numbers; cos and sin have as many. With `turn_back` what
  // the gradient of out makes of that of x: the transposed matrix.
  void (*rotate)(const float* x, const float* cos, const float* sin, int64_t half, bool turn_back, float* out);
};

BALCAPRL_SIMD_TABLES(LayerTable, layer_table)

inline const LayerTable& layer_table() { return BALCAPRL_SIMD_CHOOSE(layer_table); }

}  // namespace balcaprl
