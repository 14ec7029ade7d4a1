// Vectors of float for the code in kernels/csrc/simd/, which CMake compiles once per instruction set: loads and stores
// of float32, bfloat16 and float16, exp, maximum and reductions. The code uses the vector extensions of GCC and Clang,
// so that the same source works for every width: 16 lanes (AVX-512), 8 (AVX2 with FMA), 4 (the baseline of the target).
//
// Code that includes this header must put everything in namespace balcaprl::BALCAPRL_SIMD_LEVEL and all helpers in an
// unnamed namespace, and must not include standard library headers that define inline functions. Such a function could
// be compiled with AVX-512 here, and the linker could then choose this version for the whole library.
//
// For one level the results are the same on every machine. Results of different levels differ by a few units in the
// last place, because sums are split over a different number of lanes and only AVX2 and AVX-512 fuse multiply and add.
// Only group_columns.cpp gives the same bits at every level.
#pragma once

#include <stdint.h>
#include <string.h>

#if !defined(BALCAPRL_SIMD_LEVEL)
#error "compile this file per level: see CMakeLists.txt"
#endif

namespace balcaprl {
namespace BALCAPRL_SIMD_LEVEL {
namespace {

#define BALCAPRL_INLINE inline __attribute__((always_inline))

constexpr int kLanes = BALCAPRL_SIMD_LANES;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// Storage types: the bits of a bfloat16 or an IEEE half.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr float kInfinity = __builtin_inff();

BALCAPRL_INLINE Floats splat(float x) { return Floats{} + x; }

// If one operand of max or min is NaN, the result is `b`: an operand whose NaN must not be lost has to be passed as
// `b`. Compilers do not generate AVX-512's instructions for max, min and powers of two from vector extensions, so
// builtins are used. The last two operands of these builtins mean "all lanes" and "default rounding".
#if defined(__AVX512F__)
BALCAPRL_INLINE Floats max(Floats a, Floats b) { return __builtin_ia32_maxps512_mask(a, b, a, -1, 4); }
BALCAPRL_INLINE Floats min(Floats a, Floats b) { return __builtin_ia32_minps512_mask(a, b, a, -1, 4); }
#else
BALCAPRL_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
BALCAPRL_INLINE Floats min(Floats a, Floats b) { return a < b ? a : b; }
#endif

// Returns v * 2^n with one rounding, for v in [0.5, 2] and integer n in [-151, 129]; n must equal shifted - rounder.
BALCAPRL_INLINE Floats times_power_of_two(Floats v, Floats n, Floats shifted, float rounder) {
#if defined(__AVX512F__)
  (void)shifted;
  (void)rounder;
  return __builtin_ia32_scalefps512_mask(v, n, v, -1, 4);
#else
  (void)n;
  // The last bits of `shifted` are n. 2^n is split into two factors, so that each factor is a normal number.
  const Ints exponent = (Ints)shifted - (Ints)splat(rounder);
  const Ints first = exponent >> 1;
  const Floats low = (Floats)((first + 127) << 23);
  const Floats high = (Floats)((exponent - first + 127) << 23);
  return v * low * high;
#endif
}

// Reductions over the lanes; the order of the lanes is always the same.

BALCAPRL_INLINE float reduce_max(Floats v) {
  float result = v[0];
  for (int i = 1; i < kLanes; ++i) result = result > v[i] ? result : v[i];
  return result;
}

BALCAPRL_INLINE double reduce_sum(Floats v) {
  double result = 0.0;
  for (int i = 0; i < kLanes; ++i) result += static_cast<double>(v[i]);
  return result;
}

BALCAPRL_INLINE bool any(Ints mask) {
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= mask[i];
  return bits != 0;
}

// Conversions between 16-bit storage and float. Rounding is to nearest, ties to even; NaN stays NaN.

BALCAPRL_INLINE Floats widen(Halves bits, BFloat16) { return (Floats)(__builtin_convertvector(bits, Words) << 16); }

BALCAPRL_INLINE Halves narrow(Floats v, BFloat16) {
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(v == v ? rounded : quiet, Halves);
}

BALCAPRL_INLINE Floats widen(Halves half, Float16) {
  const Words bits = __builtin_convertvector(half, Words);
  const Words sign = (bits & 0x8000u) << 16;
  const Words magnitude = (bits & 0x7fffu) << 13;
  // The exponent bias of a half is 127 - 15 = 112 less than that of a float. Correcting the bias by a multiplication
  // also turns subnormal halves into normal floats.
  const Words finite = (Words)((Floats)magnitude * 0x1p112f);
  return (Floats)(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}

BALCAPRL_INLINE Halves narrow(Floats v, Float16) {
  const Words bits = (Words)v;
  const Words sign = (bits >> 16) & 0x8000u;
  const Words magnitude = bits & 0x7fffffffu;
  // Normal halves: reduce the exponent by 112 and round at bit 13. A carry into the exponent gives the correct result,
  // including infinity.
  const Words normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal halves: adding 0.5 makes the addition round at 2^-24, the spacing of subnormal halves.
  const Words subnormal = (Words)((Floats)magnitude + 0.5f) - (Words)splat(0.5f);
  Words result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x47800000u ? Words{} + 0x7c00u : result;
  result = magnitude > 0x7f800000u ? Words{} + 0x7e00u : result;
  return __builtin_convertvector(sign | result, Halves);
}

// Loads and stores of kLanes values at any alignment; the partial versions touch only the first `count` values.

BALCAPRL_INLINE Floats load(const float* from) {
  Floats v;
  memcpy(&v, from, sizeof(v));
  return v;
}

template <typename Half>
BALCAPRL_INLINE Floats load(const Half* from) {
  Halves bits;
  memcpy(&bits, from, sizeof(bits));
  return widen(bits, Half{});
}

BALCAPRL_INLINE void store(float* to, Floats v) { memcpy(to, &v, sizeof(v)); }

template <typename Half>
BALCAPRL_INLINE void store(Half* to, Floats v) {
  const Halves bits = narrow(v, Half{});
  memcpy(to, &bits, sizeof(bits));
}

// Loads `count` values; the lanes from `count` on are set to `fill`.
template <typename T>
BALCAPRL_INLINE Floats load_partial(const T* from, int64_t count, float fill) {
  T buffer[kLanes] = {};
  memcpy(buffer, from, static_cast<size_t>(count) * sizeof(T));
  Floats v = load(buffer);
  for (int64_t i = count; i < kLanes; ++i) v[i] = fill;
  return v;
}

template <typename T>
BALCAPRL_INLINE void store_partial(T* to, Floats v, int64_t count) {
  T buffer[kLanes];
  store(buffer, v);
  memcpy(to, buffer, static_cast<size_t>(count) * sizeof(T));
}

// Loads and stores of one value, with the same conversions.

BALCAPRL_INLINE float load_one(const float* from) { return *from; }
template <typename Half>
BALCAPRL_INLINE float load_one(const Half* from) {
  Halves bits = {};
  bits[0] = from->bits;
  return widen(bits, Half{})[0];
}

BALCAPRL_INLINE void store_one(float* to, float value) { *to = value; }
template <typename Half>
BALCAPRL_INLINE void store_one(Half* to, float value) {
  to->bits = narrow(splat(value), Half{})[0];
}

// Returns e^x within 2 units in the last place, including subnormal results; e^-inf = 0, e^inf = inf, NaN stays NaN.
//
// x = n log 2 + r with |r| <= log(2) / 2, and e^r = 1 + r + r^2 q(r). q is the polynomial of degree 4 that minimises
// the largest relative error of e^r: 3.8e-9 with the rounded coefficients, which were found by reweighted least squares
// on Chebyshev nodes.
BALCAPRL_INLINE Floats exp(Floats x) {
  constexpr float kRounder = 0x1.8p23f;
  // Outside these bounds the result is 0 or infinity anyway, and 2^n would not fit into two factors.
  x = max(splat(-104.0f), x);
  x = min(splat(89.0f), x);
  const Floats shifted = x * 0x1.715476p0f + kRounder;
  const Floats n = shifted - kRounder;
  // log 2 is split into two parts, so that the product of n and the first part is exact.
  const Floats r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  Floats q = splat(0x1.6a2434p-10f);
  q = q * r + 0x1.1239e2p-7f;
  q = q * r + 0x1.5558f2p-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const Floats value = (q * r + 1.0f) * r + 1.0f;
  return times_power_of_two(value, n, shifted, kRounder);
}

}  // namespace
}  // namespace BALCAPRL_SIMD_LEVEL
}  // namespace balcaprl
