// Deviations d are taken from the group's first score. This makes equal scores exactly 0 and preserves a tiny spread on
// a large offset. Because the shift is one of the n scores, the sum of squares about it is at most n + 1 times the sum
// of squares about the mean. sum(d^2) - sum(d)^2 / n therefore loses at most that factor to cancellation, and one pass
// is enough.
#include "../group_columns.h"

#include "../simd.h"

namespace balcaprl {
namespace BALCAPRL_SIMD_LEVEL {
namespace {

// A vector fills one register, because compilers split wider vectors into single values for comparisons.
constexpr int kGroups = kLanes / 2;
typedef double Doubles __attribute__((vector_size(8 * kGroups)));

BALCAPRL_INLINE Doubles load(const double* from) {
  Doubles v;
  memcpy(&v, from, sizeof(v));
  return v;
}
BALCAPRL_INLINE void store(double* to, Doubles v) { memcpy(to, &v, sizeof(v)); }

// weight * z is ((x - first) * scale - mean) * factor, and 0 for a missing x.
struct Normaliser {
  Doubles first, scale, mean;
  Doubles factor;  // 0 if there are fewer than two scores, or all are equal
};

BALCAPRL_INLINE Doubles first_scores(const GroupColumns& columns) {
  Doubles first = load(columns.values);
  for (int64_t j = 1; j < columns.count; ++j) {
    bool missing = false;
    for (int i = 0; i < kGroups; ++i) missing |= first[i] != first[i];
    if (!missing) break;
    const Doubles x = load(columns.values + j * columns.stride);
    first = first == first ? first : x;
  }
  return first;
}

BALCAPRL_INLINE bool choose_scale(const GroupColumns& columns, Doubles& scale) {
  const Doubles infinity = Doubles{} + static_cast<double>(kInfinity);
  Doubles low = infinity, high = -infinity;
  for (int64_t j = 0; j < columns.count; ++j) {
    const Doubles x = load(columns.values + j * columns.stride);
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  for (int i = 0; i < kGroups; ++i) {
    if (low[i] < -columns.limit || high[i] > columns.limit) return false;
    scale[i] = inverse_power(high[i] > low[i] ? high[i] - low[i] : 0.0);
  }
  return true;
}

template <bool kScale>
BALCAPRL_INLINE bool prepare(const GroupColumns& columns, double eps, double weight, Normaliser& out) {
  const Doubles zero = {}, one = zero + 1.0;
  const Doubles first = first_scores(columns);
  Doubles scale = one, present = zero, sum = zero, squares = zero;
  if (kScale && !choose_scale(columns, scale)) return false;
  for (int64_t j = 0; j < columns.count; ++j) {
    const Doubles x = load(columns.values + j * columns.stride);
    Doubles d = x - first;
    if (kScale) d *= scale;
    d = x == x ? d : zero;
    present += x == x ? one : zero;
    sum += d;
    squares += d * d;
  }
  bool finite = true;
  for (int i = 0; i < kGroups; ++i) finite &= squares[i] < static_cast<double>(kInfinity);
  if (!finite) return false;
  const Doubles count = present > 1.5 ? present : zero + 2.0;
  const Doubles mean = sum / count;
  const Doubles variance = (squares - sum * mean) / (count - 1.0);
  Doubles std = zero;
  for (int i = 0; i < kGroups; ++i) std[i] = __builtin_sqrt(variance[i] > 0.0 ? variance[i] : 0.0);
  const Doubles unit = kScale ? one / scale : one;
  const Doubles factor = weight * (unit / (unit * std + eps));
  out = {first, scale, mean, (std > 0.0) & (present > 1.5) ? factor : zero};
  return true;
}

template <bool kScale>
bool add_normalised(const GroupColumns& columns, double eps, double weight, const GroupTotals& to) {
  Normaliser by;
  if (!prepare<kScale>(columns, eps, weight, by)) return false;
  const Doubles zero = {};
  for (int64_t j = 0; j < columns.count; ++j) {
    const Doubles x = load(columns.values + j * columns.stride);
    Doubles d = x - by.first;
    if (kScale) d *= by.scale;
    const Doubles z = x == x ? (d - by.mean) * by.factor : zero;
    store(to.totals + j * to.stride, load(to.totals + j * to.stride) + z);
  }
  return true;
}

bool choose(const GroupColumns& columns, bool scale, double eps, double weight, const GroupTotals& totals) {
  return scale ? add_normalised<true>(columns, eps, weight, totals) : add_normalised<false>(columns, eps, weight, totals);
}

// Value i belongs to partial result i % kPartials for every register width, so that all widths give the same bits.
constexpr int kPartials = 8;
constexpr int kVectors = kPartials / kGroups;

// Calls use(v, k) for all values in order, kGroups values at a time; lane i of v belongs to partial result
// k * kGroups + i. Lanes past the end are NaN.
template <typename Use>
BALCAPRL_INLINE void for_each(const double* values, int64_t count, const Use& use) {
  int64_t i = 0;
  for (; i + kPartials <= count; i += kPartials) {
    for (int k = 0; k < kVectors; ++k) use(load(values + i + k * kGroups), k);
  }
  if (i == count) return;
  double rest[kPartials];
  for (int k = 0; k < kPartials; ++k) rest[k] = i + k < count ? values[i + k] : __builtin_nan("");
  for (int k = 0; k < kVectors; ++k) use(load(rest + k * kGroups), k);
}

struct Partials {
  Doubles parts[kVectors];

  explicit Partials(double start) {
    for (Doubles& part : parts) part = Doubles{} + start;
  }
  double sum() const {
    double result = 0.0;
    for (int i = 0; i < kPartials; ++i) result += parts[i / kGroups][i % kGroups];
    return result;
  }
};

double batch_std(const double* totals, int64_t count, double noise) {
  Partials low(static_cast<double>(kInfinity)), high(-static_cast<double>(kInfinity));
  for_each(totals, count, [&](Doubles x, int k) {
    low.parts[k] = x < low.parts[k] ? x : low.parts[k];
    high.parts[k] = x > high.parts[k] ? x : high.parts[k];
  });
  double lowest = static_cast<double>(kInfinity), highest = -lowest;
  for (int i = 0; i < kPartials; ++i) {
    const double a = low.parts[i / kGroups][i % kGroups], b = high.parts[i / kGroups][i % kGroups];
    lowest = a < lowest ? a : lowest;
    highest = b > highest ? b : highest;
  }
  if (!(highest - lowest > noise)) return 0.0;
  const Doubles zero = {}, one = zero + 1.0;
  const double scale = inverse_power(highest - lowest);
  Partials present(0.0), sums(0.0), squares(0.0);
  for_each(totals, count, [&](Doubles x, int k) {
    const Doubles d = x == x ? (x - lowest) * scale : zero;
    present.parts[k] += x == x ? one : zero;
    sums.parts[k] += d;
    squares.parts[k] += d * d;
  });
  const double n = present.sum(), sum = sums.sum();
  return __builtin_sqrt((squares.sum() - sum * (sum / n)) / (n - 1.0)) / scale;
}

typedef float GroupFloats __attribute__((vector_size(4 * kGroups)));

void divide(const double* totals, int64_t count, double divisor, float* advantages) {
  const Doubles zero = {};
  int64_t i = 0;
  for (; i + kGroups <= count; i += kGroups) {
    const Doubles x = load(totals + i) / divisor;
    const GroupFloats result = __builtin_convertvector(x == x ? x : zero, GroupFloats);
    memcpy(advantages + i, &result, sizeof(result));
  }
  for (; i < count; ++i) {
    const double x = totals[i] / divisor;
    advantages[i] = static_cast<float>(x == x ? x : 0.0);
  }
}

}  // namespace

extern const GroupTable group_table;
const GroupTable group_table = {kGroups, choose, batch_std, divide};

}  // namespace BALCAPRL_SIMD_LEVEL
}  // namespace balcaprl
