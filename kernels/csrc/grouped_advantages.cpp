// Grouped advantages: see kernels/ops/grouped_advantages.py for the mathematics and every edge rule.
//
// The rewards are read once, group by group; a group's column lives in a small buffer while its statistics are taken.
// Everything is accumulated in double, in index order, on one thread: the same input gives the same bits, and a group's
// result depends on that group alone (for gdpo: on the batch).
//
// Each column is first moved to its smallest finite value and divided by its range. The shift makes equal entries exactly 0
// and keeps tiny spreads on large offsets; the division keeps squares from overflowing or vanishing.

#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "native.h"

namespace {

using balcaprl::Status;

constexpr double kMissing = std::numeric_limits<double>::quiet_NaN();
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

  bool rejects(int64_t rollout) const {
    const double ratio = lengths[rollout] / reference_lengths[rollout];
    return !(low <= ratio && ratio <= high);
  }
};

struct Moments {
  int64_t count = 0;  // finite entries
  double pivot = 0.0;
  double range = 0.0;
  double mean = 0.0;  // of (value - pivot) / range
  double std = 0.0;   // of the values, ddof 1

  bool flat() const { return count < 2 || range == 0.0; }
  double centred(double value) const { return range * ((value - pivot) / range - mean); }
};

Moments moments_of(const std::vector<double>& column) {
  Moments m;
  double low = std::numeric_limits<double>::infinity();
  double high = -low;
  for (const double value : column) {
    if (std::isnan(value)) continue;
    ++m.count;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (m.count < 2) return m;
  m.pivot = low;
  m.range = high - low;
  if (m.range == 0.0) return m;

  double sum = 0.0;
  for (const double value : column) {
    if (!std::isnan(value)) sum += (value - m.pivot) / m.range;
  }
  m.mean = sum / static_cast<double>(m.count);

  double squares = 0.0;
  for (const double value : column) {
    if (std::isnan(value)) continue;
    const double deviation = (value - m.pivot) / m.range - m.mean;
    squares += deviation * deviation;
  }
  m.std = m.range * std::sqrt(squares / static_cast<double>(m.count - 1));
  return m;
}

// total[j] += scale * z[j] over the finite entries; a missing total becomes 0 first, as the rollout now has a score.
void add_normalised(const std::vector<double>& column, double scale, double eps, double* total) {
  const Moments m = moments_of(column);
  for (size_t j = 0; j < column.size(); ++j) {
    if (std::isnan(column[j])) continue;
    if (std::isnan(total[j])) total[j] = 0.0;
    if (!m.flat()) total[j] += scale * (m.centred(column[j]) / (m.std + eps));
  }
}

// Copies reward k of the group that starts at `first` into `column`. False on an entry that is neither finite nor NaN.
template <typename T>
bool load_column(const T* rewards, const Shape& shape, const LengthMask& mask, int64_t first, int64_t k,
                 std::vector<double>& column) {
  const bool masked = mask.lengths != nullptr && mask.reward == k;
  for (int64_t j = 0; j < shape.group_size; ++j) {
    double value = static_cast<double>(rewards[(first + j) * shape.num_rewards + k]);
    if (std::fabs(value) > kMaxReward) return false;
    if (masked && !std::isnan(value) && mask.rejects(first + j)) value = 0.0;
    column[static_cast<size_t>(j)] = value;
  }
  return true;
}

Status check_arguments(const Shape& shape, const double* weights, const LengthMask& mask) {
  for (int64_t k = 0; weights != nullptr && k < shape.num_rewards; ++k) {
    if (!(std::fabs(weights[k]) <= kMaxWeight)) return balcaprl::kBadWeights;
  }
  if (mask.lengths == nullptr) return balcaprl::kOk;
  for (int64_t i = 0; i < shape.num_rollouts; ++i) {
    if (!(mask.lengths[i] >= 0.0 && std::isfinite(mask.lengths[i]))) return balcaprl::kBadLengths;
    if (!(mask.reference_lengths[i] > 0.0 && std::isfinite(mask.reference_lengths[i]))) {
      return balcaprl::kBadReferenceLengths;
    }
  }
  return balcaprl::kOk;
}

// Fills totals (R), NaN where a rollout has no score.
template <typename T>
Status normalise_groups(const T* rewards, const Shape& shape, const double* weights, const LengthMask& mask, Method method,
                        double eps, std::vector<double>& totals) {
  std::vector<double> column(static_cast<size_t>(shape.group_size));
  std::vector<double> sums(column.size());
  for (int64_t first = 0; first < shape.num_rollouts; first += shape.group_size) {
    double* total = totals.data() + first;
    if (method == kSumFirst) sums.assign(sums.size(), kMissing);
    for (int64_t k = 0; k < shape.num_rewards; ++k) {
      const double weight = weights == nullptr ? 1.0 : weights[k];
      if (!load_column(rewards, shape, mask, first, k, column)) return balcaprl::kBadRewards;
      if (method != kSumFirst) {
        add_normalised(column, weight, eps, total);
        continue;
      }
      for (size_t j = 0; j < column.size(); ++j) {
        if (!std::isnan(column[j])) sums[j] = (std::isnan(sums[j]) ? 0.0 : sums[j]) + weight * column[j];
      }
    }
    if (method == kSumFirst) add_normalised(sums, 1.0, eps, total);
  }
  return balcaprl::kOk;
}

template <typename T>
int32_t run(const T* rewards, const Shape& shape, const double* weights, const LengthMask& mask, Method method, double eps,
            float* advantages) {
  const Status status = check_arguments(shape, weights, mask);
  if (status != balcaprl::kOk) return status;
  try {
    std::vector<double> totals(static_cast<size_t>(shape.num_rollouts), kMissing);
    const Status normalised = normalise_groups(rewards, shape, weights, mask, method, eps, totals);
    if (normalised != balcaprl::kOk) return normalised;
    double divisor = 1.0;
    if (method == kDecoupledBatch) {
      const Moments batch = moments_of(totals);
      // The batch mean is 0 by construction (every z sums to 0 over its group): taking it away would only add noise.
      divisor = batch.flat() ? std::numeric_limits<double>::infinity() : batch.std + eps;
    }
    for (size_t i = 0; i < totals.size(); ++i) {
      advantages[i] = std::isnan(totals[i]) ? 0.0F : static_cast<float>(totals[i] / divisor);
    }
  } catch (const std::bad_alloc&) {
    return balcaprl::kOutOfMemory;
  }
  return balcaprl::kOk;
}

}  // namespace

// rewards (R, K); weights (K) or null; lengths and reference_lengths (R) or both null; advantages (R), written.
// group_size divides num_rollouts; 0 <= masked_reward < num_rewards where lengths are given. The caller has checked this.
#define BALCAPRL_GROUPED_ADVANTAGES(suffix, type)                                                                         \
  BALCAPRL_EXPORT int32_t balcaprl_grouped_advantages_##suffix(                                                           \
      const type* rewards, int64_t num_rollouts, int64_t num_rewards, int64_t group_size, const double* weights,          \
      const double* lengths, const double* reference_lengths, int64_t masked_reward, double length_low,                   \
      double length_high, int32_t method, double eps, float* advantages) {                                                \
    const LengthMask mask{lengths, reference_lengths, masked_reward, length_low, length_high};                            \
    return run(rewards, Shape{num_rollouts, num_rewards, group_size}, weights, mask, static_cast<Method>(method), eps,    \
               advantages);                                                                                               \
  }

BALCAPRL_GROUPED_ADVANTAGES(f32, float)
BALCAPRL_GROUPED_ADVANTAGES(f64, double)
