#include "../simd.h"
#include "../softmax.h"

namespace balcaprl {
namespace BALCAPRL_SIMD_LEVEL {
namespace {

// Sums over this many logits are in float; the sum of these sums is in double.
constexpr int64_t kSumBlock = 1024;
constexpr float kLowest = -3.402823466e38f;

template <typename T>
float max_of(const T* x, int64_t count) {
  Floats highest[4];
  for (Floats& v : highest) v = splat(-kInfinity);
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) highest[k] = max(load(x + i + k * kLanes), highest[k]);
  }
  for (; i + kLanes <= count; i += kLanes) highest[0] = max(load(x + i), highest[0]);
  if (i < count) highest[0] = max(load_partial(x + i, count - i, -kInfinity), highest[0]);
  return reduce_max(max(max(highest[0], highest[1]), max(highest[2], highest[3])));
}

// Running sums of exp(d), and of d * exp(d) for the entropy, where d = (x - max) * scale.
struct Sums {
  Floats exps = Floats{};
  Floats weighted = Floats{};
};

template <bool kEntropy>
BALCAPRL_INLINE void add(Floats x, float highest, float scale, Sums& sums) {
  const Floats d = (x - highest) * scale;
  const Floats e = exp(d);
  sums.exps += e;
  // A logit of -inf has probability 0 and must add 0; without the bound, 0 * -inf would be NaN.
  if (kEntropy) sums.weighted += e * (d < kLowest ? splat(kLowest) : d);
}

template <bool kEntropy, typename T>
void sum_block(const T* x, int64_t count, float highest, float scale, double& exps, double& weighted) {
  Sums sums[2];
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    add<kEntropy>(load(x + i), highest, scale, sums[0]);
    add<kEntropy>(load(x + i + kLanes), highest, scale, sums[1]);
  }
  for (; i < count; i += kLanes) {
    const int64_t left = count - i;
    add<kEntropy>(left < kLanes ? load_partial(x + i, left, -kInfinity) : load(x + i), highest, scale, sums[0]);
  }
  exps += reduce_sum(sums[0].exps + sums[1].exps);
  if (kEntropy) weighted += reduce_sum(sums[0].weighted + sums[1].weighted);
}

template <typename T>
void stats(const void* logits, int64_t count, float scale, bool with_entropy, SoftmaxStats* out) {
  const T* x = static_cast<const T*>(logits);
  // The row is read in two passes; the second pass finds it in the cache.
  const float highest = max_of(x, count);
  double exps = 0.0, weighted = 0.0;
  for (int64_t begin = 0; begin < count; begin += kSumBlock) {
    const int64_t size = count - begin < kSumBlock ? count - begin : kSumBlock;
    if (with_entropy) {
      sum_block<true>(x + begin, size, highest, scale, exps, weighted);
    } else {
      sum_block<false>(x + begin, size, highest, scale, exps, weighted);
    }
  }
  // H = log(sum) - weighted / sum. If all probabilities but one underflow, H is 0; rounding must not make H negative.
  const double entropy = __builtin_log(exps) - weighted / exps;
  *out = SoftmaxStats{highest, exps, entropy < 0.0 ? 0.0 : entropy};
}

BALCAPRL_INLINE Floats gradient_of(Floats x, const SoftmaxRow& row) {
  return exp((x - row.max) * row.scale) * row.coefficient;
}

template <typename T>
void gradient(const void* logits, void* gradients, int64_t count, const SoftmaxRow& row, int64_t target) {
  const T* x = static_cast<const T*>(logits);
  T* out = static_cast<T*>(gradients);
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Floats first = gradient_of(load(x + i), row), second = gradient_of(load(x + i + kLanes), row);
    store(out + i, first);
    store(out + i + kLanes, second);
  }
  for (; i < count; i += kLanes) {
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    store_partial(out + i, gradient_of(load_partial(x + i, left, 0.0f), row), left);
  }
  if (target >= 0 && target < count) store_one(out + target, row.target_value);
}

template <typename T>
void gather_gradient(const void* logits, void* gradients, const int64_t* columns, int64_t count, const SoftmaxRow& row,
                     int64_t target) {
  const T* x = static_cast<const T*>(logits);
  T* out = static_cast<T*>(gradients);
  T buffer[kLanes] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    for (int64_t k = 0; k < left; ++k) buffer[k] = x[columns[i + k]];
    store_partial(out + i, gradient_of(load(buffer), row), left);
  }
  if (target >= 0 && target < count) store_one(out + target, row.target_value);
}

template <typename T>
void mark(const void* logits, int64_t count, float threshold, int32_t* marks) {
  const T* x = static_cast<const T*>(logits);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Ints seen;
    memcpy(&seen, marks + i, sizeof(seen));
    seen |= load(x + i) >= threshold;
    memcpy(marks + i, &seen, sizeof(seen));
  }
  for (; i < count; ++i) marks[i] |= load_one(x + i) >= threshold ? -1 : 0;
}

template <typename T>
float value(const void* logit) {
  return load_one(static_cast<const T*>(logit));
}

}  // namespace

extern const SoftmaxTable softmax_table;
const SoftmaxTable softmax_table = {
    {stats<float>, stats<BFloat16>, stats<Float16>},
    {gradient<float>, gradient<BFloat16>, gradient<Float16>},
    {gather_gradient<float>, gather_gradient<BFloat16>, gather_gradient<Float16>},
    {mark<float>, mark<BFloat16>, mark<Float16>},
    {value<float>, value<BFloat16>, value<Float16>},
    kLanes,
};

}  // namespace BALCAPRL_SIMD_LEVEL
}  // namespace balcaprl
