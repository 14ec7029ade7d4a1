// Row-wise softmax of logits in float32, bfloat16 or float16: statistics, gradient, and the search for columns that matter.
// Implemented once per instruction set in simd/softmax.cpp. All arithmetic is in float32, sums over a row in float64.
//
// A row of logits x with factor `scale` (1 / temperature) has the softmax p_v = exp((x_v - max) * scale) / sum. `max` and
// `sum` describe it better than their logarithm would: p then carries no rounding of a large logsumexp.
#pragma once

#include <cstdint>

#include "simd_level.h"

namespace balcaprl {

// As _DTYPE_CODES in kernels/ops/native_softmax.py.
enum LogitsType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
constexpr int32_t kNumLogitsTypes = 3;

struct SoftmaxStats {
  float max;       // of x, not scaled
  double sum;      // of exp((x - max) * scale); NaN if an x is NaN or +inf, or all are -inf
  double entropy;  // of p in nats; only where asked for
};

// What the gradient of a row needs: d x_v = coefficient * exp((x_v - max) * scale), and `target_value` at the target.
struct SoftmaxRow {
  float max;
  float scale;
  float coefficient;   // -g * scale / sum, g the gradient of the target's log-probability
  float target_value;  // g * scale * (1 - p_target)
};

struct SoftmaxTable {
  // Statistics of `count` logits.
  void (*stats[kNumLogitsTypes])(const void* x, int64_t count, float scale, bool with_entropy, SoftmaxStats* stats);
  // The gradient of columns [0, count) of a row into `out`, which may be `x` itself. `target` is the target's column, or
  // anything outside [0, count) where it lies elsewhere.
  void (*gradient[kNumLogitsTypes])(const void* x, void* out, int64_t count, const SoftmaxRow& row, int64_t target);
  // The same for `count` chosen columns, side by side in `out`; `target` is a position in `columns`.
  void (*gather_gradient[kNumLogitsTypes])(const void* x, void* out, const int64_t* columns, int64_t count,
                                           const SoftmaxRow& row, int64_t target);
  // marks[v] |= -1 where x_v >= threshold.
  void (*mark[kNumLogitsTypes])(const void* x, int64_t count, float threshold, int32_t* marks);
  // One logit as a float.
  float (*value[kNumLogitsTypes])(const void* x);
  int32_t lanes;
};

BALCAPRL_SIMD_TABLES(SoftmaxTable, softmax_table)

inline const SoftmaxTable& softmax_table() { return BALCAPRL_SIMD_CHOOSE(softmax_table); }

}  // namespace balcaprl
