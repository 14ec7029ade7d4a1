// Row-wise softmax of logits in float32, bfloat16 or float16: statistics, gradient, and the search for columns with a
// large softmax. The code is compiled once per instruction set, in simd/softmax.cpp. Arithmetic is in float32; a row is
// summed in float32 within blocks of columns, and in float64 over the blocks.
//
// A row of logits x with factor `scale` (1 / temperature) has the softmax p_v = exp((x_v - max) * scale) / sum. `max`
// and `sum` are stored instead of the log-sum-exp, because the rounding of a large log-sum-exp would make p inaccurate.
#pragma once

#include <cstdint>

#include "simd_level.h"

namespace balcaprl {

// The codes are the positions in DTYPES of kernels/ops/support/native_softmax.py.
enum LogitsType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
constexpr int32_t kNumLogitsTypes = 3;

struct SoftmaxStats {
  float max;       // maximum of x, not scaled
  double sum;      // sum of exp((x - max) * scale); NaN if an x is NaN or +inf, or all are -inf
  double entropy;  // entropy of p in nats; valid only if it was asked for
};

// Parameters of the gradient of a row, which is coefficient * exp((x_v - max) * scale) at column v, and `target_value`
// at the target.
struct SoftmaxRow {
  float max;
  float scale;
  float coefficient;   // -g * scale / sum, where g is the gradient of the target's log-probability
  float target_value;  // g * scale * (1 - p_target)
};

struct SoftmaxTable {
  // Computes the statistics of `count` logits.
  void (*stats[kNumLogitsTypes])(const void* x, int64_t count, float scale, bool with_entropy, SoftmaxStats* stats);
  // Writes the gradient of columns [0, count) of a row to `out`, which may be `x` itself. `target` is the target's
  // column, or any number outside [0, count) if the target is not one of these columns.
  void (*gradient[kNumLogitsTypes])(const void* x, void* out, int64_t count, const SoftmaxRow& row, int64_t target);
  // Writes the gradient at the `count` columns listed in `columns` to out[0], ..., out[count - 1]. `target` is the
  // target's position in `columns`, or any number outside [0, count).
  void (*gather_gradient[kNumLogitsTypes])(const void* x, void* out, const int64_t* columns, int64_t count,
                                           const SoftmaxRow& row, int64_t target);
  // Sets marks[v] to -1 where x_v >= threshold, and leaves the other marks as they are.
  void (*mark[kNumLogitsTypes])(const void* x, int64_t count, float threshold, int32_t* marks);
  // Converts the logit at `x` to float.
  float (*value[kNumLogitsTypes])(const void* x);
  int32_t lanes;
};

BALCAPRL_SIMD_TABLES(SoftmaxTable, softmax_table)

inline const SoftmaxTable& softmax_table() { return BALCAPRL_SIMD_CHOOSE(softmax_table); }

}  // namespace balcaprl
