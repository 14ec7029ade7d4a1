// The policy loss of a ragged batch. balcaprl_token_batch checks values and copies each rollout's values to its tokens;
// balcaprl_token_loss computes loss, gradient and metrics in one pass. They implement token_batch and token_loss of
// kernels/ops/loss/token_loss.py.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <new>
#include <vector>

#include "native.h"
#include "parallel.h"
#include "token_loss.h"

namespace {

using balcaprl::TokenSums;

constexpr int64_t kBlock = 8192;  // tokens in a block of work

enum Reduction : int32_t { kTokenMean = 0, kSequenceMean = 1, kConstant = 2 };

int64_t num_blocks(int64_t num_tokens) { return (num_tokens + kBlock - 1) / kBlock; }

// Returns whether all values are finite, which means that no exponent is all ones. A null array counts as finite.
bool finite(const float* values, int64_t begin, int64_t end) {
  if (values == nullptr) return true;
  uint32_t largest = 0;
  for (int64_t i = begin; i < end; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    largest = std::max(largest, bits & 0x7f800000u);
  }
  return largest != 0x7f800000u;
}

bool valid_offsets(const int32_t* offsets, int64_t num_rollouts, int64_t num_tokens) {
  if (offsets[0] != 0 || offsets[num_rollouts] != num_tokens) return false;
  bool rising = true;
  for (int64_t j = 0; j < num_rollouts; ++j) rising &= offsets[j] <= offsets[j + 1];
  return rising;
}

double denominator_of(const int32_t* offsets, int64_t num_rollouts, int64_t num_tokens, Reduction reduction) {
  if (reduction == kTokenMean) return static_cast<double>(std::max<int64_t>(num_tokens, 1));
  if (reduction == kSequenceMean) return static_cast<double>(std::max<int64_t>(num_rollouts, 1));
  int64_t longest = 0;
  for (int64_t j = 0; j < num_rollouts; ++j) longest = std::max<int64_t>(longest, offsets[j + 1] - offsets[j]);
  return static_cast<double>(std::max<int64_t>(longest * num_rollouts, 1));
}

}  // namespace

// Sizes: offsets (R + 1), advantages (R), log-probabilities (T) or null. Writes spread_advantages and scale, both (T).
// With a normalizer of 0 the default denominator of the reduction is used. Returns kBadOffsets or kBadValues if a value
// is not allowed.
BALCAPRL_EXPORT int32_t balcaprl_token_batch(int64_t num_tokens, int64_t num_rollouts, const int32_t* offsets,
                                             const float* advantages, const float* logprobs, const float* old_logprobs,
                                             const float* sampling_logprobs, const float* reference_logprobs,
                                             int32_t reduction, double normalizer, float* spread_advantages,
                                             float* scale) {
  if (!valid_offsets(offsets, num_rollouts, num_tokens)) return balcaprl::kBadOffsets;
  bool good = finite(advantages, 0, num_rollouts);
  const float* per_token[] = {logprobs, old_logprobs, sampling_logprobs, reference_logprobs};
  for (const float* values : per_token) good = good && finite(values, 0, num_tokens);
  if (!good) return balcaprl::kBadValues;

  const auto kind = static_cast<Reduction>(reduction);
  const double denominator = normalizer > 0.0 ? normalizer : denominator_of(offsets, num_rollouts, num_tokens, kind);
  for (int64_t j = 0; j < num_rollouts; ++j) {
    const int64_t length = offsets[j + 1] - offsets[j];
    const double share = kind == kSequenceMean ? denominator * static_cast<double>(length) : denominator;
    std::fill(spread_advantages + offsets[j], spread_advantages + offsets[j + 1], advantages[j]);
    std::fill(scale + offsets[j], scale + offsets[j + 1], static_cast<float>(1.0 / share));
  }
  return balcaprl::kOk;
}

// All inputs are (T); old, sampling and reference log-probabilities may be null. A cap of 0 turns importance sampling
// off. Writes the gradients (T) and 7 numbers: the loss, then METRIC_SUMS of kernels/ops/loss/records.py.
BALCAPRL_EXPORT int32_t balcaprl_token_loss(int64_t num_tokens, const float* logprobs, const float* old_logprobs,
                                            const float* advantages, const float* scale, const float* sampling_logprobs,
                                            const float* reference_logprobs, double clip_low, double clip_high,
                                            double sampling_cap, double kl_coef, float* gradients, double* sums) {
  const balcaprl::TokenInputs inputs{logprobs, old_logprobs, advantages, scale, sampling_logprobs, reference_logprobs};
  const balcaprl::TokenSettings settings{clip_low, clip_high, sampling_cap, kl_coef};
  const auto& table = balcaprl::token_loss_table();
  TokenSums total;
  try {
    std::vector<TokenSums> parts(static_cast<size_t>(num_blocks(num_tokens)));
    balcaprl::parallel_for(num_blocks(num_tokens), [&](int64_t block) {
      const int64_t begin = block * kBlock, end = std::min(num_tokens, begin + kBlock);
      table.token_loss(inputs, settings, begin, end, gradients, &parts[static_cast<size_t>(block)]);
    });
    for (const TokenSums& part : parts) {
      total.loss += part.loss;
      total.clipped += part.clipped;
      total.ratio += part.ratio;
      total.ratio_max = std::max(total.ratio_max, part.ratio_max);
      total.k3_reference += part.k3_reference;
      total.k3_sampling += part.k3_sampling;
      total.count += part.count;
    }
  } catch (const std::bad_alloc&) {
    return balcaprl::kOutOfMemory;
  }
  const double result[] = {total.loss,         total.clipped,     total.ratio, total.ratio_max,
                           total.k3_reference, total.k3_sampling, total.count};
  std::copy(std::begin(result), std::end(result), sums);
  return balcaprl::kOk;
}
