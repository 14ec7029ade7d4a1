// Gradient of the policy loss with respect to logits: each logit read once, each gradient written once, into the logits
// themselves or another array. The forward is balcaprl_softmax_stats of linear_logprobs.cpp.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "native.h"
#include "parallel.h"
#include "softmax.h"

namespace {

// Columns of one row that a block takes: small enough that few rows still feed all threads.
constexpr int64_t kTile = 16384;

struct Matrix {
  char* data;
  int64_t row_stride;
  int64_t value_bytes;

  char* at(int64_t row, int64_t column) const { return data + (row * row_stride + column) * value_bytes; }
};

}  // namespace

// For row t with gradient g = grad_logprobs[t]: out[t][v] = g * scale * ([v == targets[t]] - exp((x - row_max) * scale) /
// row_sum). A row with g == 0 is set to 0 and not read. `out` is `logits` with the same stride, or does not overlap it.
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
    // 1 - p by way of expm1: near p = 1 it keeps its digits.
    const balcaprl::SoftmaxRow row{row_max[t], static_cast<float>(scale), -gradient / row_sum[t],
                                   -gradient * std::expm1(logprobs[t])};
    table.gradient[type](from.at(t, begin), to.at(t, begin), size, row, targets[t] - begin);
  });
  return balcaprl::kOk;
}
