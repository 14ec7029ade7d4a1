// RMSNorm, silu(gate) * up and rotary positions over many rows, forward and backward, for kernels/ops/layers/native.py.
// All arrays are float32.
#include "layers.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "native.h"
#include "parallel.h"

namespace {

using balcaprl::layer_table;
using balcaprl::parallel_for;

// Sizes of the blocks of work. In the norm's backward, each block of kRows rows has its own sum for the weight's
// gradient.
constexpr int64_t kRows = 64;       // the most rows, or tokens, in a block
constexpr int64_t kColumns = 512;   // columns in a block that adds up those sums
constexpr int64_t kNumbers = 8192;  // numbers in a block of all other work

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace

// Sizes: x and out (num_rows, size), weight (size), rstd (num_rows).
BALCAPRL_EXPORT int32_t balcaprl_rms_norm(int64_t num_rows, int64_t size, const float* x, const float* weight, double eps,
                                          float* out, float* rstd) {
  const auto& table = layer_table();
  const int64_t rows = std::clamp<int64_t>(kNumbers / std::max<int64_t>(size, 1), 1, kRows);
  parallel_for(blocks_of(num_rows, rows), [&](int64_t block) {
    for (int64_t t = block * rows; t < std::min(num_rows, (block + 1) * rows); ++t) {
      rstd[t] = table.rms_norm(x + t * size, weight, size, eps, out + t * size);
    }
  });
  return balcaprl::kOk;
}

// Sizes: grad, x and grad_x (num_rows, size), weight (size), rstd (num_rows), grad_weight (size) or null. The gradient
// of the weight is summed in float32 within a block of rows, and in float64 over the blocks.
BALCAPRL_EXPORT int32_t balcaprl_rms_norm_backward(int64_t num_rows, int64_t size, const float* grad, const float* x,
                                                   const float* weight, const float* rstd, float* grad_x,
                                                   float* grad_weight) {
  const auto& table = layer_table();
  const int64_t num_blocks = blocks_of(num_rows, kRows);
  std::unique_ptr<float[]> sums;
  if (grad_weight != nullptr) {
    sums.reset(new (std::nothrow) float[static_cast<size_t>(num_blocks * size)]);
    if (sums == nullptr) return balcaprl::kOutOfMemory;
  }
  parallel_for(num_blocks, [&](int64_t block) {
    float* own = sums == nullptr ? nullptr : sums.get() + block * size;
    if (own != nullptr) std::fill(own, own + size, 0.0f);
    for (int64_t t = block * kRows; t < std::min(num_rows, (block + 1) * kRows); ++t) {
      table.rms_norm_backward(grad + t * size, x + t * size, weight, size, rstd[t], grad_x + t * size, own);
    }
  });
  if (sums == nullptr) return balcaprl::kOk;
  parallel_for(blocks_of(size, kColumns), [&](int64_t stripe) {
    const int64_t begin = stripe * kColumns, count = std::min(kColumns, size - begin);
    double totals[kColumns] = {};
    for (int64_t block = 0; block < num_blocks; ++block) {
      const float* own = sums.get() + block * size + begin;
      for (int64_t i = 0; i < count; ++i) totals[i] += static_cast<double>(own[i]);
    }
    for (int64_t i = 0; i < count; ++i) grad_weight[begin + i] = static_cast<float>(totals[i]);
  });
  return balcaprl::kOk;
}

// Sizes: gate, up and out (count).
BALCAPRL_EXPORT int32_t balcaprl_silu_mul(int64_t count, const float* gate, const float* up, float* out) {
  const auto& table = layer_table();
  parallel_for(blocks_of(count, kNumbers), [&](int64_t block) {
    const int64_t i = block * kNumbers;
    table.silu_mul(gate + i, up + i, std::min(kNumbers, count - i), out + i);
  });
  return balcaprl::kOk;
}

BALCAPRL_EXPORT int32_t balcaprl_silu_mul_backward(int64_t count, const float* grad, const float* gate, const float* up,
                                                   float* grad_gate, float* grad_up) {
  const auto& table = layer_table();
  parallel_for(blocks_of(count, kNumbers), [&](int64_t block) {
    const int64_t i = block * kNumbers;
    table.silu_mul_backward(grad + i, gate + i, up + i, std::min(kNumbers, count - i), grad_gate + i, grad_up + i);
  });
  return balcaprl::kOk;
}

// Sizes: x and out (num_tokens, num_heads, 2 * half), cos and sin (num_tokens, 2 * half). With turn_back != 0 it
// computes the gradient, see layers.h.
BALCAPRL_EXPORT int32_t balcaprl_rotate(int64_t num_tokens, int64_t num_heads, int64_t half, const float* x,
                                        const float* cos, const float* sin, int32_t turn_back, float* out) {
  const auto& table = layer_table();
  const int64_t head = 2 * half, row = num_heads * head;
  const int64_t tokens = std::clamp<int64_t>(kNumbers / std::max<int64_t>(row, 1), 1, kRows);
  parallel_for(blocks_of(num_tokens, tokens), [&](int64_t block) {
    for (int64_t t = block * tokens; t < std::min(num_tokens, (block + 1) * tokens); ++t) {
      for (int64_t h = 0; h < num_heads; ++h) {
        const int64_t at = t * row + h * head;
        table.rotate(x + at, cos + t * head, sin + t * head, half, turn_back != 0, out + at);
      }
    }
  });
  return balcaprl::kOk;
}
