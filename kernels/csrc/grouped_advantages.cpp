// Grouped advantages; kernels/ops/advantages/grouped_advantages.py has the mathematics and every edge rule.
//
// The rewards are read once. A batch of groups is converted to double and laid out so that the same entries of
// neighbouring groups are adjacent in memory. The statistics of several groups can then be computed at once, without a
// branch, and each group is still summed in the order of its rollouts. The same input gives the same bits on every
// machine and with any number of threads. A group's result depends only on that group (for gdpo: on the whole batch).

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "group_columns.h"
#include "native.h"
#include "parallel.h"

namespace {

using balcaprl::GroupColumns;
using balcaprl::GroupTotals;
using balcaprl::Status;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kMaxReward = 1e150;  // with larger rewards a weighted sum could overflow
constexpr double kMaxWeight = 1e30;
constexpr double kRounding = 64 * std::numeric_limits<double>::epsilon();
constexpr int64_t kBatchValues = 2048;     // rewards in a batch of groups, so that it stays in the first-level cache
constexpr int64_t kBlockValues = 1 << 16;  // rewards in a block of work for a thread

constexpr int64_t kWidth = balcaprl::kGroupsPadding;

enum Method : int32_t { kDecoupled = 0, kDecoupledBatch = 1, kSumFirst = 2 };

struct Shape {
  int64_t num_rollouts;
  int64_t num_rewards;
  int64_t group_size;

  int64_t num_groups() const { return num_rollouts / group_size; }
};

struct LengthMask {
  const double* lengths;            // null if there is no mask
  const double* reference_lengths;  // same size as lengths
  int64_t reward;                   // the column that the mask gates
  double low;
  double high;

  bool rejects(int64_t rollout) const {
    const double ratio = lengths[rollout] / reference_lengths[rollout];
    return !(low <= ratio && ratio <= high);
  }
};

struct Problem {
  Shape shape;
  const double* weights;  // null if all weights are 1
  LengthMask mask;
  Method method;
  double eps;

  double weight(int64_t k) const { return weights == nullptr ? 1.0 : weights[k]; }
};

// The memory of one block of work. It holds one batch of groups at a time.
struct Workspace {
  int64_t width;   // number of groups that lie side by side, a multiple of kWidth
  double* values;  // values[(j * K + k) * width + g]: group g, rollout j, reward k; NaN if there is no score or group
  double* totals;  // totals[j * width + g]: group g, rollout j
  double* scored;  // scored[j * width + g]: 1 if the rollout has a score, otherwise 0

  static int64_t doubles(int64_t width, int64_t group_size, int64_t num_rewards) {
    return width * group_size * (num_rewards + 2);
  }
  Workspace(double* memory, int64_t groups, int64_t group_size, int64_t num_rewards)
      : width(groups),
        values(memory),
        totals(values + groups * group_size * num_rewards),
        scored(totals + groups * group_size) {}
};

// Fills `values` with the rewards of `num_groups` groups from `first_group` on and applies the length mask. kRewards is
// the number of rewards if it is known at compile time, otherwise 0. `scored` is written only for methods that need it.
template <typename T, int kRewards>
void load(const T* rewards, const Problem& problem, int64_t first_group, int64_t num_groups, Workspace& work) {
  const int64_t num_rewards = kRewards > 0 ? kRewards : problem.shape.num_rewards;
  const int64_t size = problem.shape.group_size, width = work.width;
  const bool masked = problem.mask.lengths != nullptr, needs_scored = problem.method != kDecoupled;
  for (int64_t j = 0; j < size; ++j) {
    double* const to = work.values + j * num_rewards * width;
    for (int64_t g = 0; g < num_groups; ++g) {
      const T* const from = rewards + ((first_group + g) * size + j) * num_rewards;
      for (int64_t k = 0; k < num_rewards; ++k) to[k * width + g] = static_cast<double>(from[k]);
    }
    for (int64_t k = 0; k < num_rewards; ++k) std::fill(to + k * width + num_groups, to + (k + 1) * width, NAN);
    double* const scored = work.scored + j * width;
    if (needs_scored) std::fill(scored, scored + width, 0.0);
    for (int64_t k = 0; needs_scored && k < num_rewards; ++k) {
      const double* const scores = to + k * width;
      for (int64_t g = 0; g < width; ++g) scored[g] = scores[g] == scores[g] ? 1.0 : scored[g];
    }
    for (int64_t g = 0; masked && g < num_groups; ++g) {
      double& x = to[problem.mask.reward * width + g];
      // A missing score stays missing, and a reward that is too large stays in place for the later check.
      if (std::fabs(x) <= kMaxReward && problem.mask.rejects((first_group + g) * size + j)) x = 0.0;
    }
  }
}

// For c-gdpo and gdpo: totals = sum over rewards of weight * z. Returns false on a bad reward.
bool add_normalised(const Problem& problem, bool scale, Workspace& work) {
  const int64_t num_rewards = problem.shape.num_rewards, size = problem.shape.group_size;
  std::fill(work.totals, work.totals + size * work.width, 0.0);
  const auto& table = balcaprl::group_table();
  for (int64_t g = 0; g < work.width; g += table.groups) {
    for (int64_t k = 0; k < num_rewards; ++k) {
      const GroupColumns columns{work.values + k * work.width + g, num_rewards * work.width, size, kMaxReward};
      const GroupTotals totals{work.totals + g, work.width};
      if (!table.add_normalised(columns, scale, problem.eps, problem.weight(k), totals)) return false;
    }
  }
  return true;
}

// For grpo: totals = z of the weighted sum of the scores that exist. Returns false on a bad reward.
bool normalise_sums(const Problem& problem, Workspace& work) {
  const int64_t num_rewards = problem.shape.num_rewards, size = problem.shape.group_size, width = work.width;
  bool good = true;
  for (int64_t j = 0; j < size; ++j) {
    for (int64_t g = 0; g < width; ++g) {
      double total = 0.0;
      bool any = false;
      for (int64_t k = 0; k < num_rewards; ++k) {
        const double x = work.values[(j * num_rewards + k) * width + g];
        good &= !(std::fabs(x) > kMaxReward);
        any |= x == x;
        total += x == x ? problem.weight(k) * x : 0.0;
      }
      // The sums overwrite the values. Row j of the sums lies at or before row j of the values, so that nothing is
      // overwritten before it is read.
      work.values[j * width + g] = any ? total : NAN;
    }
  }
  if (!good) return false;
  std::fill(work.totals, work.totals + size * width, 0.0);
  const auto& table = balcaprl::group_table();
  for (int64_t g = 0; g < width; g += table.groups) {
    const GroupColumns columns{work.values + g, width, size, kInfinity};
    table.add_normalised(columns, true, problem.eps, 1.0, GroupTotals{work.totals + g, width});
  }
  return true;
}

// Writes the advantages of one batch of groups to work.totals. Returns false on a bad reward.
template <typename T>
bool normalise(const T* rewards, const Problem& problem, int64_t first_group, int64_t num_groups, Workspace& work) {
  switch (problem.shape.num_rewards) {
    case 1: load<T, 1>(rewards, problem, first_group, num_groups, work); break;
    case 2: load<T, 2>(rewards, problem, first_group, num_groups, work); break;
    case 3: load<T, 3>(rewards, problem, first_group, num_groups, work); break;
    default: load<T, 0>(rewards, problem, first_group, num_groups, work); break;
  }
  // Float rewards need no scaling: the squares of their differences are well inside the range of double.
  constexpr bool kScale = std::is_same<T, double>::value;
  return problem.method == kSumFirst ? normalise_sums(problem, work) : add_normalised(problem, kScale, work);
}

Status check_arguments(const Problem& problem) {
  for (int64_t k = 0; problem.weights != nullptr && k < problem.shape.num_rewards; ++k) {
    if (!(std::fabs(problem.weights[k]) <= kMaxWeight)) return balcaprl::kBadWeights;
  }
  const LengthMask& mask = problem.mask;
  if (mask.lengths == nullptr) return balcaprl::kOk;
  bool good = true, good_reference = true;
  for (int64_t i = 0; i < problem.shape.num_rollouts; ++i) {
    good &= mask.lengths[i] >= 0.0 && mask.lengths[i] < kInfinity;
    good_reference &= mask.reference_lengths[i] > 0.0 && mask.reference_lengths[i] < kInfinity;
  }
  return !good ? balcaprl::kBadLengths : good_reference ? balcaprl::kOk : balcaprl::kBadReferenceLengths;
}

// Divisor of the totals for gdpo; a total is NaN for a rollout without a score. The batch mean is 0 by construction
// (every z sums to 0 over its group), so only the std is needed; subtracting the mean would move rounding noise into
// flat groups. Totals that differ by no more than the rounding of their terms count as flat; the divisor is then
// infinite, which makes every advantage 0.
double batch_divisor(const double* totals, const Problem& problem) {
  double weights = 0.0;
  for (int64_t k = 0; k < problem.shape.num_rewards; ++k) weights += std::fabs(problem.weight(k));
  const double std = balcaprl::group_table().batch_std(totals, problem.shape.num_rollouts, kRounding * weights);
  return std > 0.0 ? std + problem.eps : kInfinity;
}

// Settings and status that all blocks of work share.
struct Job {
  int64_t batch_groups;  // groups in a batch
  double* totals;        // (R) totals for gdpo; null for other methods
  std::atomic<int32_t> status{balcaprl::kOk};
};

template <typename T>
void run_block(const T* rewards, const Problem& problem, int64_t begin, int64_t end, float* advantages, Job& job) {
  const int64_t size = problem.shape.group_size;
  const int64_t width = (std::min(job.batch_groups, end - begin) + kWidth - 1) / kWidth * kWidth;
  const auto doubles = static_cast<size_t>(Workspace::doubles(width, size, problem.shape.num_rewards));
  const std::unique_ptr<double[]> memory(new (std::nothrow) double[doubles]);
  if (memory == nullptr) {
    job.status = balcaprl::kOutOfMemory;
    return;
  }
  Workspace work(memory.get(), width, size, problem.shape.num_rewards);
  for (int64_t first = begin; first < end; first += job.batch_groups) {
    const int64_t groups = std::min(job.batch_groups, end - first);
    if (!normalise(rewards, problem, first, groups, work)) {
      job.status = balcaprl::kBadRewards;
      return;
    }
    if (job.totals != nullptr) {
      for (int64_t i = 0; i < size * width; ++i) work.totals[i] = work.scored[i] != 0.0 ? work.totals[i] : NAN;
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t to = (first + g) * size;
      for (int64_t j = 0; job.totals != nullptr && j < size; ++j) job.totals[to + j] = work.totals[j * width + g];
      for (int64_t j = 0; job.totals == nullptr && j < size; ++j) {
        advantages[to + j] = static_cast<float>(work.totals[j * width + g]);
      }
    }
  }
}

template <typename T>
int32_t run(const T* rewards, const Problem& problem, float* advantages) {
  const Status status = check_arguments(problem);
  if (status != balcaprl::kOk) return status;
  const Shape& shape = problem.shape;
  const int64_t group_values = shape.group_size * shape.num_rewards;
  Job job;
  job.batch_groups = std::max<int64_t>(1, kBatchValues / (group_values * kWidth)) * kWidth;
  const int64_t block_groups = job.batch_groups * std::max<int64_t>(1, kBlockValues / (job.batch_groups * group_values));
  const int64_t num_blocks = (shape.num_groups() + block_groups - 1) / block_groups;
  std::unique_ptr<double[]> totals;
  if (problem.method == kDecoupledBatch) {
    totals.reset(new (std::nothrow) double[static_cast<size_t>(shape.num_rollouts)]);
    if (totals == nullptr) return balcaprl::kOutOfMemory;
  }
  job.totals = totals.get();
  balcaprl::parallel_for(num_blocks, [&](int64_t block) {
    const int64_t begin = block * block_groups, end = std::min(shape.num_groups(), begin + block_groups);
    run_block(rewards, problem, begin, end, advantages, job);
  });
  if (job.status != balcaprl::kOk || totals == nullptr) return job.status;
  balcaprl::group_table().divide(job.totals, shape.num_rollouts, batch_divisor(job.totals, problem), advantages);
  return balcaprl::kOk;
}

}  // namespace

// Sizes: rewards (R, K), weights (K) or null, lengths and reference_lengths (R) or both null. Writes advantages (R).
// The caller has checked that group_size divides num_rollouts, and that 0 <= masked_reward < num_rewards if lengths are
// given.
#define BALCAPRL_GROUPED_ADVANTAGES(suffix, type)                                                                   \
  BALCAPRL_EXPORT int32_t balcaprl_grouped_advantages_##suffix(                                                     \
      const type* rewards, int64_t num_rollouts, int64_t num_rewards, int64_t group_size, const double* weights,    \
      const double* lengths, const double* reference_lengths, int64_t masked_reward, double length_low,             \
      double length_high, int32_t method, double eps, float* advantages) {                                          \
    const LengthMask mask{lengths, reference_lengths, masked_reward, length_low, length_high};                      \
    const Shape shape{num_rollouts, num_rewards, group_size};                                                       \
    return run(rewards, Problem{shape, weights, mask, static_cast<Method>(method), eps}, advantages);               \
  }

BALCAPRL_GROUPED_ADVANTAGES(f32, float)
BALCAPRL_GROUPED_ADVANTAGES(f64, double)
