// Normalises one reward in several groups at once; grouped_advantages.cpp calls it for every reward, or for grpo once
// for the weighted sums. The code is compiled once per instruction set, in simd/group_columns.cpp. All instruction sets
// give the same bits, because the code is compiled without contraction to fused multiply-add and each group has its own
// lane.
#pragma once

#include <cstdint>

#include "simd_level.h"

namespace balcaprl {

constexpr int64_t kGroupsPadding = 8;  // a multiple of GroupTable::groups of every instruction set

// Score j of group g is values[j * stride + g]; NaN marks a missing score.
struct GroupColumns {
  const double* values;
  int64_t stride;
  int64_t count;
  double limit;  // scores beyond +-limit are refused if deviations are scaled; infinite scores are always refused
};

struct GroupTotals {
  double* totals;  // totals[j * stride + g] += weight * z
  int64_t stride;
};

struct GroupTable {
  int64_t groups;  // number of groups that one call processes, from g = 0 on
  // Adds weight * z to the totals. With `scale`, deviations are first multiplied by a power of two near the inverse of
  // their range, for values whose squares could leave the range of double. If a score is refused, returns false and
  // adds nothing.
  bool (*add_normalised)(const GroupColumns& columns, bool scale, double eps, double weight, const GroupTotals& totals);
  // Returns the standard deviation (ddof 1) of the totals that are not NaN; 0 if they differ by no more than `noise`.
  double (*batch_std)(const double* totals, int64_t count, double noise);
  // Writes advantages = totals / divisor, and 0 where a total is NaN.
  void (*divide)(const double* totals, int64_t count, double divisor, float* advantages);
};

BALCAPRL_SIMD_TABLES(GroupTable, group_table)

inline const GroupTable& group_table() { return BALCAPRL_SIMD_CHOOSE(group_table); }

// Returns 2^-e for x in [2^e, 2^(e + 1)), and 2^1023 for a subnormal x and for 0.
static inline double inverse_power(double x) {
  union {
    double value;
    uint64_t bits;
  } number = {x};
  number.bits = (uint64_t{2046} << 52) - (number.bits & (uint64_t{0x7ff} << 52));
  return number.value;
}

}  // namespace balcaprl
