// Normalisation of one reward in several groups at once: what grouped_advantages.cpp does for every reward. Implemented once per
// instruction set in simd/group_columns.cpp, without contraction to fused multiply-add and with each group in a lane of its
// own: all instruction sets give the same bits.
#pragma once

#include <cstdint>

#include "simd_level.h"

namespace balcaprl {

constexpr int64_t kGroupsPadding = 8;  // a multiple of `groups` of every level

// Score j of group g is values[j * stride + g]; NaN: there is none.
struct GroupColumns {
  const double* values;
  int64_t stride;
  int64_t count;
  double limit;  // scores beyond it are refused, if deviations are scaled; infinite ones always
};

struct GroupTotals {
  double* totals;  // totals[j * stride + g] += weight * z
  int64_t stride;
};

struct GroupTable {
  int64_t groups;  // worked on by one call, from g = 0 on
  // `scale`: deviations are scaled by the power of two next to their range, for values whose squares leave the range of
  // double. False, and nothing is added, if a score is refused.
  bool (*add_normalised)(const GroupColumns& columns, bool scale, double eps, double weight, const GroupTotals& totals);
  // Standard deviation (ddof 1) of the totals that are not NaN; 0 if they differ by no more than `noise`.
  double (*batch_std)(const double* totals, int64_t count, double noise);
  // advantages = totals / divisor, and 0 where a total is NaN.
  void (*divide)(const double* totals, int64_t count, double divisor, float* advantages);
};

BALCAPRL_SIMD_TABLES(GroupTable, group_table)

inline const GroupTable& group_table() { return BALCAPRL_SIMD_CHOOSE(group_table); }

// 2^-e for x = 2^e * [1, 2); 2^1023 for a subnormal x and for 0.
static inline double inverse_power(double x) {
  union {
    double value;
    uint64_t bits;
  } number = {x};
  number.bits = (uint64_t{2046} << 52) - (number.bits & (uint64_t{0x7ff} << 52));
  return number.value;
}

}  // namespace balcaprl
