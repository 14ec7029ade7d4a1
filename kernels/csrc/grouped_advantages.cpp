// Grouped advantages: see kernels/ops/grouped_advantages.py for the mathematics and every edge rule.
//
// The rewards are read once, group by group; the scores that a group has for one reward are copied, densely and in
// double, into a small buffer on which the statistics are taken. All sums run in index order on one thread: the same
// input gives the same bits, and a group's result depends on that group alone (for gdpo: on the batch).
//
// A column is first moved to its smallest value and divided by its range. The shift makes equal entries exactly 0 and
// keeps tiny spreads on large offsets; the division keeps squares from overflowing or vanishing.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "native.h"

namespace {

using balcaprl::Status;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kMaxReward = 1e150;  // beyond it a weighted sum of rewards may overflow
constexpr double kMaxWeight = 1e30;

enum Method : int32_t { kDecoupled = 0, kDecoupledBatch = 1, kSumFirst = 2 };

struct Shape {
  int64_t num_rollouts;
  int64_t num_rewards;
  int64_t group_size;
};

struct LengthMask {
  const double* lengths;            // null: no mask
  const double* reference_lengths;  // as long as lengths
  int64_t reward;                   // the column that the mask gates
  double low;
  double high;

  bool gates(int64_t k) const { return lengths != nullptr && reward == k; }
  bool rejects(int64_t rollout) const {
    const double ratio = lengths[rollout] / reference_lengths[rollout];
    return !(low <= ratio && ratio <= high);
  }
};

// The scores that are there, and the rollouts that they belong to.
struct Column {
  std::vector<double> values;
  std::vector<int64_t> rollouts;
  size_t count = 0;

  explicit Column(int64_t capacity) : values(static_cast<size_t>(capacity)), rollouts(values.size()) {}
  void clear() { count = 0; }
  void add(double value, int64_t rollout) {
    values[count] = value;
    rollouts[count++] = rollout;
  }
};

struct Totals {
  std::vector<double> values;
  std::vector<uint8_t> scored;  // whether the rollout has any score

  explicit Totals(int64_t size) : values(static_cast<size_t>(size), 0.0), scored(values.size(), 0) {}
};

struct Spread {
  double range = 0.0;  // 0: fewer than two values, or all equal; nothing else is set then
  double std = 0.0;    // ddof 1
};

// Replaces the column's values by their deviations from the mean in units of the range.
Spread centre(Column& column) {
  Spread spread;
  if (column.count < 2) return spread;
  double* values = column.values.data();
  double low = kInfinity;
  double high = -kInfinity;
  for (size_t j = 0; j < column.count; ++j) {
    low = values[j] < low ? values[j] : low;
    high = values[j] > high ? values[j] : high;
  }
  spread.range = high - low;
  if (spread.range == 0.0) return spread;

  for (size_t j = 0; j < column.count; ++j) values[j] = (values[j] - low) / spread.range;
  double sum = 0.0;
  for (size_t j = 0; j < column.count; ++j) sum += values[j];
  const double mean = sum / static_cast<double>(column.count);
  double squares = 0.0;
  for (size_t j = 0; j < column.count; ++j) {
    values[j] -= mean;
    squares += values[j] * values[j];
  }
  spread.std = spread.range * std::sqrt(squares / static_cast<double>(column.count - 1));
  return spread;
}

// totals += weight * z for the rollouts of the column, whose values are used up.
void add_normalised(Column& column, double weight, double eps, Totals& totals) {
  const Spread spread = centre(column);
  if (spread.range == 0.0) return;
  const double scale = weight * (spread.range / (spread.std + eps));
  for (size_t j = 0; j < column.count; ++j) {
    totals.values[static_cast<size_t>(column.rollouts[j])] += scale * column.values[j];
  }
}

// Fills `column` with reward k of the group that starts at `first`, mask applied, and notes who has a score. False on
// an entry that is neither finite nor NaN, or too large.
template <typename T>
bool load_column(const T* rewards, const Shape& shape, const LengthMask& mask, int64_t first, int64_t k, Column& column,
                 Totals& totals) {
  const bool gated = mask.gates(k);
  column.clear();
  for (int64_t i = first; i < first + shape.group_size; ++i) {
    const double value = static_cast<double>(rewards[i * shape.num_rewards + k]);
    if (std::isnan(value)) continue;
    if (std::fabs(value) > kMaxReward) return false;
    column.add(gated && mask.rejects(i) ? 0.0 : value, i);
    totals.scored[static_cast<size_t>(i)] = 1;
  }
  return true;
}

Status check_arguments(const Shape& shape, const double* weights, const LengthMask& mask) {
  for (int64_t k = 0; weights != nullptr && k < shape.num_rewards; ++k) {
    if (!(std::fabs(weights[k]) <= kMaxWeight)) return balcaprl::kBadWeights;
  }
  if (mask.lengths == nullptr) return balcaprl::kOk;
  for (int64_t i = 0; i < shape.num_rollouts; ++i) {
    if (!(mask.lengths[i] >= 0.0 && mask.lengths[i] < kInfinity)) return balcaprl::kBadLengths;
    if (!(mask.reference_lengths[i] > 0.0 && mask.reference_lengths[i] < kInfinity)) {
      return balcaprl::kBadReferenceLengths;
    }
  }
  return balcaprl::kOk;
}

// grpo: adds up the weighted scores of each rollout of one group, then normalises the sums.
void normalise_sums(Column& sums, int64_t first, int64_t group_size, double eps, Totals& totals) {
  sums.clear();
  for (int64_t i = first; i < first + group_size; ++i) {
    const auto index = static_cast<size_t>(i);
    if (totals.scored[index] == 0) continue;
    sums.add(totals.values[index], i);
    totals.values[index] = 0.0;
  }
  add_normalised(sums, 1.0, eps, totals);
}

template <typename T>
Status normalise_groups(const T* rewards, const Shape& shape, const double* weights, const LengthMask& mask,
                        Method method, double eps, Totals& totals) {
  Column column(shape.group_size);
  for (int64_t first = 0; first < shape.num_rollouts; first += shape.group_size) {
    for (int64_t k = 0; k < shape.num_rewards; ++k) {
      const double weight = weights == nullptr ? 1.0 : weights[k];
      if (!load_column(rewards, shape, mask, first, k, column, totals)) return balcaprl::kBadRewards;
      if (method != kSumFirst) {
        add_normalised(column, weight, eps, totals);
        continue;
      }
      for (size_t j = 0; j < column.count; ++j) {
        totals.values[static_cast<size_t>(column.rollouts[j])] += weight * column.values[j];
      }
    }
    if (method == kSumFirst) normalise_sums(column, first, shape.group_size, eps, totals);
  }
  return balcaprl::kOk;
}

// gdpo: what the totals are divided by. The batch mean is 0 by construction (every z sums to 0 over its group), so that
// only the std is needed: taking the mean away would move rounding noise into flat groups.
double batch_divisor(const Totals& totals, double eps) {
  Column scored(static_cast<int64_t>(totals.values.size()));
  for (size_t i = 0; i < totals.values.size(); ++i) {
    if (totals.scored[i] != 0) scored.add(totals.values[i], static_cast<int64_t>(i));
  }
  const Spread spread = centre(scored);
  return spread.range == 0.0 ? kInfinity : spread.std + eps;
}

template <typename T>
int32_t run(const T* rewards, const Shape& shape, const double* weights, const LengthMask& mask, Method method,
            double eps, float* advantages) {
  const Status status = check_arguments(shape, weights, mask);
  if (status != balcaprl::kOk) return status;
  try {
    Totals totals(shape.num_rollouts);
    const Status normalised = normalise_groups(rewards, shape, weights, mask, method, eps, totals);
    if (normalised != balcaprl::kOk) return normalised;
    const double divisor = method == kDecoupledBatch ? batch_divisor(totals, eps) : 1.0;
    for (size_t i = 0; i < totals.values.size(); ++i) advantages[i] = static_cast<float>(totals.values[i] / divisor);
  } catch (const std::bad_alloc&) {
    return balcaprl::kOutOfMemory;
  }
  return balcaprl::kOk;
}

}  // namespace

// rewards (R, K); weights (K) or null; lengths and reference_lengths (R) or both null; advantages (R), written. The
// caller has checked that group_size divides num_rollouts and, where lengths are given, 0 <= masked_reward < num_rewards.
#define BALCAPRL_GROUPED_ADVANTAGES(suffix, type)                                                                   \
  BALCAPRL_EXPORT int32_t balcaprl_grouped_advantages_##suffix(                                                     \
      const type* rewards, int64_t num_rollouts, int64_t num_rewards, int64_t group_size, const double* weights,    \
      const double* lengths, const double* reference_lengths, int64_t masked_reward, double length_low,             \
      double length_high, int32_t method, double eps, float* advantages) {                                          \
    const LengthMask mask{lengths, reference_lengths, masked_reward, length_low, length_high};                      \
    return run(rewards, Shape{num_rollouts, num_rewards, group_size}, weights, mask, static_cast<Method>(method),   \
               eps, advantages);                                                                                    \
  }

BALCAPRL_GROUPED_ADVANTAGES(f32, float)
BALCAPRL_GROUPED_ADVANTAGES(f64, double)
