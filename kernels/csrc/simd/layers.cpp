#include "../layers.h"

#include "../simd.h"

namespace balcaprl {
namespace BALCAPRL_SIMD_LEVEL {
namespace {

// Number of independent running sums. Additions to different sums do not have to wait for each other.
constexpr int kSums = 4;

// Calls use(begin, count, k) for pieces of at most kLanes numbers, in order; k is the index of the piece's running sum.
template <typename Use>
BALCAPRL_INLINE void for_each_piece(int64_t size, const Use& use) {
  int64_t i = 0;
  for (; i + kSums * kLanes <= size; i += kSums * kLanes) {
    for (int k = 0; k < kSums; ++k) use(i + k * kLanes, int64_t{kLanes}, k);
  }
  for (; i < size; i += kLanes) use(i, size - i < kLanes ? size - i : int64_t{kLanes}, 0);
}

// Load and store of `count` <= kLanes numbers; the remaining lanes of a load are 0.
BALCAPRL_INLINE Floats load_piece(const float* from, int64_t count) {
  return count == kLanes ? load(from) : load_partial(from, count, 0.0f);
}

BALCAPRL_INLINE void store_piece(float* to, Floats v, int64_t count) {
  if (count == kLanes) {
    store(to, v);
  } else {
    store_partial(to, v, count);
  }
}

BALCAPRL_INLINE double total(const Floats (&sums)[kSums]) { return reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3])); }

float rms_norm(const float* x, const float* weight, int64_t size, double eps, float* out) {
  Floats squares[kSums] = {};
  for_each_piece(size, [&](int64_t i, int64_t count, int k) {
    const Floats v = load_piece(x + i, count);
    squares[k] += v * v;
  });
  const double mean = total(squares) / static_cast<double>(size);
  const float rstd = static_cast<float>(1.0 / __builtin_sqrt(mean + eps));
  for_each_piece(size, [&](int64_t i, int64_t count, int) {
    store_piece(out + i, load_piece(x + i, count) * rstd * load_piece(weight + i, count), count);
  });
  return rstd;
}

// With h = x * rstd: grad_x = rstd * (grad * weight - h * mean(grad * weight * h)).
void rms_norm_backward(const float* grad, const float* x, const float* weight, int64_t size, float rstd, float* grad_x,
                       float* weight_sums) {
  Floats products[kSums] = {};
  for_each_piece(size, [&](int64_t i, int64_t count, int k) {
    products[k] += load_piece(grad + i, count) * load_piece(weight + i, count) * load_piece(x + i, count);
  });
  const double scale = static_cast<double>(rstd);
  const float along = static_cast<float>(total(products) / static_cast<double>(size) * scale * scale);
  for_each_piece(size, [&](int64_t i, int64_t count, int) {
    const Floats g = load_piece(grad + i, count), v = load_piece(x + i, count);
    store_piece(grad_x + i, (g * load_piece(weight + i, count) - v * along) * rstd, count);
    if (weight_sums != nullptr) store_piece(weight_sums + i, load_piece(weight_sums + i, count) + g * (v * rstd), count);
  });
}

void silu_mul(const float* gate, const float* up, int64_t size, float* out) {
  for_each_piece(size, [&](int64_t i, int64_t count, int) {
    const Floats z = load_piece(gate + i, count);
    store_piece(out + i, z / (exp(-z) + 1.0f) * load_piece(up + i, count), count);
  });
}

void silu_mul_backward(const float* grad, const float* gate, const float* up, int64_t size, float* grad_gate,
                       float* grad_up) {
  for_each_piece(size, [&](int64_t i, int64_t count, int) {
    const Floats g = load_piece(grad + i, count), z = load_piece(gate + i, count);
    const Floats sigmoid = 1.0f / (exp(-z) + 1.0f);
    store_piece(grad_gate + i, g * load_piece(up + i, count) * (sigmoid * (z * (1.0f - sigmoid) + 1.0f)), count);
    store_piece(grad_up + i, g * (z * sigmoid), count);
  });
}

template <bool kTurnBack>
BALCAPRL_INLINE void rotate_head(const float* x, const float* cos, const float* sin, int64_t half, float* out) {
  for_each_piece(half, [&](int64_t i, int64_t count, int) {
    const Floats low = load_piece(x + i, count), high = load_piece(x + half + i, count);
    const Floats cos_low = load_piece(cos + i, count), cos_high = load_piece(cos + half + i, count);
    const Floats sin_low = load_piece(sin + i, count), sin_high = load_piece(sin + half + i, count);
    store_piece(out + i, kTurnBack ? low * cos_low + high * sin_high : low * cos_low - high * sin_low, count);
    store_piece(out + half + i, kTurnBack ? high * cos_high - low * sin_low : high * cos_high + low * sin_high, count);
  });
}

void rotate(const float* x, const float* cos, const float* sin, int64_t half, bool turn_back, float* out) {
  if (turn_back) {
    rotate_head<true>(x, cos, sin, half, out);
  } else {
    rotate_head<false>(x, cos, sin, half, out);
  }
}

}  // namespace

extern const LayerTable layer_table;
const LayerTable layer_table = {rms_norm, rms_norm_backward, silu_mul, silu_mul_backward, rotate};

}  // namespace BALCAPRL_SIMD_LEVEL
}  // namespace balcaprl
