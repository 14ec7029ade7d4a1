#include "../token_loss.h"

#include "../simd.h"

namespace balcaprl {
namespace BALCAPRL_SIMD_LEVEL {
namespace {

// The arithmetic is in double. Log-probabilities differ by little, and divergences are of the order of the square of
// the difference; in float32 the rounding error of exp would be as large as the divergence. Double costs no time,
// because the pass is limited by memory anyway.
//
// A vector fills one register, because compilers split wider vectors into single values for comparisons.
constexpr int kTokens = kLanes / 2;
typedef double Doubles __attribute__((vector_size(8 * kTokens)));
typedef int64_t Longs __attribute__((vector_size(8 * kTokens)));
typedef float TokenFloats __attribute__((vector_size(4 * kTokens)));

BALCAPRL_INLINE Doubles load_wide(const float* from) {
  TokenFloats v;
  memcpy(&v, from, sizeof(v));
  return __builtin_convertvector(v, Doubles);
}
BALCAPRL_INLINE Doubles smaller(Doubles a, double b) { return a < b ? a : Doubles{} + b; }
BALCAPRL_INLINE Doubles larger(Doubles a, double b) { return a > b ? a : Doubles{} + b; }

BALCAPRL_INLINE double reduce(Doubles v) {
  double result = 0.0;
  for (int i = 0; i < kTokens; ++i) result += v[i];
  return result;
}

// Returns e^d - 1 with an error of at most 2e-11 * e^d. d = n log 2 + r, and e^r is computed by its Taylor series. d is
// clamped to [-700, 700]; beyond these bounds e^d is outside the range of float anyway.
BALCAPRL_INLINE Doubles expm1(Doubles d) {
  constexpr double kRounder = 0x1.8p52;
  d = smaller(larger(d, -700.0), 700.0);
  const Doubles shifted = d * 0x1.71547652b82fep0 + kRounder;
  const Doubles r = d - (shifted - kRounder) * 0x1.62e42fefa39efp-1;
  Doubles curve = Doubles{} + 1.0 / 3628800.0;
  curve = curve * r + 1.0 / 362880.0;
  curve = curve * r + 1.0 / 40320.0;
  curve = curve * r + 1.0 / 5040.0;
  curve = curve * r + 1.0 / 720.0;
  curve = curve * r + 1.0 / 120.0;
  curve = curve * r + 1.0 / 24.0;
  curve = curve * r + 1.0 / 6.0;
  curve = curve * r + 0.5;
  const Longs n = (Longs)shifted - (Longs)(Doubles{} + kRounder);
  const Doubles power = (Doubles)((n + 1023) << 52);
  return power * (curve * r * r + r) + (power - 1.0);
}

struct Lanes {
  Doubles logprobs, old_logprobs, advantages, scale, sampling_logprobs, reference_logprobs;
};

struct LaneSums {
  Doubles loss = {}, clipped = {}, ratio = {}, ratio_max = {}, k3_reference = {}, k3_sampling = {};
};

struct Settings {
  double lowest_ratio, highest_ratio, sampling_cap, kl_coef;
};

// Adds the tokens of the lanes to the sums and returns their gradients.
template <bool kSampling, bool kReference>
BALCAPRL_INLINE TokenFloats add(const Lanes& t, const Settings& settings, LaneSums& sums) {
  const Doubles zero = {}, one = zero + 1.0;
  const Doubles ratio = expm1(t.logprobs - t.old_logprobs) + 1.0;
  // An advantage of 0 gives a policy term of exactly 0, even if the ratio overflows.
  const Doubles surrogate = t.advantages == 0.0 ? one : ratio;
  const Longs clipped = ((t.advantages > 0.0) & (ratio > settings.highest_ratio)) |
                        ((t.advantages < 0.0) & (ratio < settings.lowest_ratio));
  const Doubles free = surrogate * t.advantages;
  const Doubles bounded = smaller(larger(surrogate, settings.lowest_ratio), settings.highest_ratio) * t.advantages;
  Doubles loss = free < bounded ? -free : -bounded;
  Doubles gradient = clipped ? zero : -free;
  if (kSampling) {
    const Doubles d = t.old_logprobs - t.sampling_logprobs;
    const Doubles excess = expm1(d);
    sums.k3_sampling += excess - d;
    if (settings.sampling_cap > 0.0) {
      const Doubles importance = smaller(excess + 1.0, settings.sampling_cap);
      loss *= importance;
      gradient *= importance;
    }
  }
  if (kReference) {
    const Doubles d = t.reference_logprobs - t.logprobs;
    const Doubles excess = expm1(d);
    sums.k3_reference += excess - d;
    if (settings.kl_coef > 0.0) {
      loss += settings.kl_coef * (excess - d);
      gradient -= settings.kl_coef * excess;
    }
  }
  sums.loss += loss * t.scale;
  sums.ratio += ratio;
  sums.clipped += clipped ? one : zero;
  sums.ratio_max = ratio > sums.ratio_max ? ratio : sums.ratio_max;
  return __builtin_convertvector(gradient * t.scale, TokenFloats);
}

BALCAPRL_INLINE Lanes load_lanes(const TokenInputs& in, int64_t i) {
  const Doubles logprobs = load_wide(in.logprobs + i);
  return {logprobs,
          in.old_logprobs == nullptr ? logprobs : load_wide(in.old_logprobs + i),
          load_wide(in.advantages + i),
          load_wide(in.scale + i),
          in.sampling_logprobs == nullptr ? logprobs : load_wide(in.sampling_logprobs + i),
          in.reference_logprobs == nullptr ? logprobs : load_wide(in.reference_logprobs + i)};
}

// Processes the last tokens, which are fewer than the lanes, in zero-padded buffers. A padded lane adds nothing but its
// ratio of 1, which is subtracted again, and the largest ratio of that lane is restored.
template <bool kSampling, bool kReference>
void add_rest(const TokenInputs& in, const Settings& settings, int64_t begin, int64_t count, float* gradients,
              LaneSums& sums) {
  float buffers[6][kTokens] = {};
  const float* from[6] = {in.logprobs, in.old_logprobs,      in.advantages,
                          in.scale,    in.sampling_logprobs, in.reference_logprobs};
  const float* to[6] = {};
  for (int k = 0; k < 6; ++k) {
    if (from[k] == nullptr) continue;
    memcpy(buffers[k], from[k] + begin, static_cast<size_t>(count) * sizeof(float));
    to[k] = buffers[k];
  }
  const Lanes lanes = load_lanes(TokenInputs{to[0], to[1], to[2], to[3], to[4], to[5]}, 0);
  const Doubles highest = sums.ratio_max;
  const TokenFloats result = add<kSampling, kReference>(lanes, settings, sums);
  memcpy(gradients + begin, &result, static_cast<size_t>(count) * sizeof(float));
  for (int64_t k = count; k < kTokens; ++k) {
    sums.ratio[k] -= 1.0;
    sums.ratio_max[k] = highest[k];
  }
}

template <bool kSampling, bool kReference>
void token_loss(const TokenInputs& in, const Settings& settings, int64_t begin, int64_t end, float* gradients,
                TokenSums* out) {
  LaneSums sums;
  int64_t i = begin;
  for (; i + kTokens <= end; i += kTokens) {
    const TokenFloats result = add<kSampling, kReference>(load_lanes(in, i), settings, sums);
    memcpy(gradients + i, &result, sizeof(result));
  }
  if (i < end) add_rest<kSampling, kReference>(in, settings, i, end - i, gradients, sums);
  double highest = 0.0;
  for (int k = 0; k < kTokens; ++k) highest = sums.ratio_max[k] > highest ? sums.ratio_max[k] : highest;
  out->loss = reduce(sums.loss);
  out->clipped = reduce(sums.clipped);
  out->ratio = reduce(sums.ratio);
  out->ratio_max = highest;
  out->k3_reference = reduce(sums.k3_reference);
  out->k3_sampling = reduce(sums.k3_sampling);
  out->count = static_cast<double>(end - begin);
}

void choose(const TokenInputs& in, const TokenSettings& settings, int64_t begin, int64_t end, float* gradients,
            TokenSums* out) {
  const Settings s{1.0 - settings.clip_low, 1.0 + settings.clip_high, settings.sampling_cap, settings.kl_coef};
  const bool sampling = in.sampling_logprobs != nullptr, reference = in.reference_logprobs != nullptr;
  if (sampling && reference) return token_loss<true, true>(in, s, begin, end, gradients, out);
  if (sampling) return token_loss<true, false>(in, s, begin, end, gradients, out);
  if (reference) return token_loss<false, true>(in, s, begin, end, gradients, out);
  return token_loss<false, false>(in, s, begin, end, gradients, out);
}

}  // namespace

extern const TokenLossTable token_loss_table;
const TokenLossTable token_loss_table = {choose};

}  // namespace BALCAPRL_SIMD_LEVEL
}  // namespace balcaprl
