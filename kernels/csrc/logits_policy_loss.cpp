// Gradient of the policy loss with respect to logits. Each logit is read once, and each gradient is written once, to
// the logits' own memory or to another array. The forward is balcaprl_softmax_stats of linear_logprobs.cpp.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "native.h"
#include "parallel.h"
#include "softmax.h"

namespace {

// Columns of one row in a block of work: few enough that even a few rows give work to all threads.
constexpr int64_t kTile = 16384;

struct Matrix {
  char* data;
  int64_t row_stride;
  int64_t value_bytes;

  char* at(int64_t row, int64_t column) const { return data + (row * row_stride + column) * value_bytes; }
};

}  // namespace

// Writes out[t][v] = g * scale * ([v == targets[t]] - exp((logits[t][v] - row_max[t]) * scale) / row_sum[t]) for row t
// with gradient g = grad_logprobs[t]. A row with g == 0 is set to 0 and not read. `out` must be `logits` with the same
// stride, or not overlap with `logits`.
BALCAPRL_EXPORT int32_t balcaprl_logits_gradient(int32_t type, const void* logits, int64_t row_stride, int64_t num_rows,
                                                 int64_t vocabulary, double scale, const int64_t* targets,
                                                 const float* row_max, const float* row_sum, const float* logprobs,
                                                 const float* grad_logprobs, void* out, int64_t out_row_stride) {
  if (type < 0 || type >= balcaprl::kNumLogitsTypes) return balcaprl::kBadLogits;
  if (vocabulary == 0) return balcaprl::kOk;
  const auto& table = balcaprl::softmax_table();
  const int64_t value_bytes = type == balcaprl::kFloat32 ? 4 : 2;
  const Matrix from{static_cast<char*>(const_cast<void*>(logits)), row_stride, value_bytes};
  const Matrix to{static_cast<char*>(out), out_row_stride, value_bytes};
  const int64_t tiles = (vocabulary + kTile - 1) / kTile;
  balcaprl::parallel_for(num_rows * tiles, [&](int64_t block) {
    const int64_t t = block / tiles, begin = block % tiles * kTile;
    const int64_t size = std::min(kTile, vocabulary - begin);
    const float gradient = grad_logprobs[t] * static_cast<float>(scale);
    if (gradient == 0.0f) {
      std::memset(to.at(t, begin), 0, static_cast<size_t>(size * value_bytes));
      return;
    }
    // 1 - p is computed as -expm1(log p), which stays accurate when p is near 1.
    const balcaprl::SoftmaxRow row{row_max[t], static_cast<float>(scale), -gradient / row_sum[t],
                                   -gradient * std::expm1(logprobs[t])};
    table.gradient[type](from.at(t, begin), to.at(t, begin), size, row, targets[t] - begin);
  });
  return balcaprl::kOk;
}
