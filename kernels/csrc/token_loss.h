// Loss, gradient and metric sums of tokens, from one advantage and one scale per token. kernels/ops/loss/token_loss.py
// has the contract, kernels/ops/loss/policy_loss.py the mathematics. Inputs and gradients are float32; arithmetic and
// sums are in float64. The code is compiled once per instruction set, in simd/token_loss.cpp.
#pragma once

#include <cstdint>

#include "simd_level.h"

namespace balcaprl {

// Arrays with one value per token; a null array means that the input was not given.
struct TokenInputs {
  const float* logprobs;
  const float* old_logprobs;  // null means on-policy
  const float* advantages;
  const float* scale;
  const float* sampling_logprobs;   // may be null
  const float* reference_logprobs;  // may be null
};

struct TokenSettings {
  double clip_low;
  double clip_high;
  double sampling_cap;  // 0 turns importance sampling off
  double kl_coef;
};

// The loss, then METRIC_SUMS of kernels/ops/loss/records.py, in that order. `ratio_max` is a maximum, not a sum.
struct TokenSums {
  double loss = 0.0;
  double clipped = 0.0;
  double ratio = 0.0;
  double ratio_max = 0.0;
  double k3_reference = 0.0;
  double k3_sampling = 0.0;
  double count = 0.0;
};

struct TokenLossTable {
  // Writes the gradients and the sums of tokens [begin, end).
  void (*token_loss)(const TokenInputs& inputs, const TokenSettings& settings, int64_t begin, int64_t end,
                     float* gradients, TokenSums* sums);
};

BALCAPRL_SIMD_TABLES(TokenLossTable, token_loss_table)

inline const TokenLossTable& token_loss_table() { return BALCAPRL_SIMD_CHOOSE(token_loss_table); }

}  // namespace balcaprl
