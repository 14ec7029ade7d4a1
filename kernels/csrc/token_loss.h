// Loss, gradient and metric sums of tokens whose advantage and scale are spread: kernels/ops/token_loss.py has the contract,
// kernels/ops/policy_loss.py the mathematics. Storage is float32, all arithmetic float64. Implemented once per
// instruction set in simd/token_loss.cpp.
#pragma once

#include <cstdint>

#include "simd_level.h"

namespace balcaprl {

// One value per token; those that may be null are not there.
struct TokenInputs {
  const float* logprobs;
  const float* old_logprobs;  // null: on-policy
  const float* advantages;
  const float* scale;
  const float* sampling_logprobs;   // or null
  const float* reference_logprobs;  // or null
};

struct TokenSettings {
  double clip_low;
  double clip_high;
  double sampling_cap;  // 0: no importance sampling
  double kl_coef;
};

// In the order of loss_sum and METRIC_SUMS in kernels/ops/token_loss.py.
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
  // Tokens [begin, end): writes their gradients and sums.
  void (*token_loss)(const TokenInputs& inputs, const TokenSettings& settings, int64_t begin, int64_t end,
                     float* gradients, TokenSums* sums);
};

BALCAPRL_SIMD_TABLES(TokenLossTable, token_loss_table)

inline const TokenLossTable& token_loss_table() { return BALCAPRL_SIMD_CHOOSE(token_loss_table); }

}  // namespace balcaprl
