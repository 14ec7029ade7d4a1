// Vectors of float for the code in kernels/csrc/simd/, which CMake compiles once per instruction set: loads and stores of
// float32, bfloat16 and float16, exp, maximum, reductions. Written with the vector extensions of GCC and Clang, so that the
// same source serves every width: 16 lanes (AVX-512), 8 (AVX2 with FMA), 4 (the baseline of the target).
//
// Rules for code that includes it: everything in namespace balcaprl::BALCAPRL_SIMD_LEVEL, all helpers in an unnamed
// namespace, and no header with inline functions of the standard library. Such a function could be compiled with AVX-512
// here and then be the linker's choice for the whole library.
//
// For one level the results are the same on every machine. Levels differ by a few units in the last place: sums are split
// over another number of lanes, and only AVX2 and AVX-512 fuse multiply and add.
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
// Of a NaN and a number these are `b`: put what must not be lost there. Compilers do not find AVX-512's instructions for
// them, nor for the power of two, in vector extensions; the builtins' last two operands are "all lanes" and "round as usual".
#if defined(__AVX512F__)
BALCAPRL_INLINE Floats max(Floats a, Floats b) { return __builtin_ia32_maxps512_mask(a, b, a, -1, 4); }
BALCAPRL_INLINE Floats min(Floats a, Floats b) { return __builtin_ia32_minps512_mask(a, b, a, -1, 4); }
#else
BALCAPRL_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
BALCAPRL_INLINE Floats min(Floats a, Floats b) { return a < b ? a : b; }
#endif

// v * 2^n with one rounding, for v in [0.5, 2] and whole n in [-151, 129]; n = shifted - rounder.
BALCAPRL_INLINE Floats times_power_of_two(Floats v, Floats n, Floats shifted, float rounder) {
#if defined(__AVX512F__)
  (void)shifted;
  (void)rounder;
  return __builtin_ia32_scalefps512_mask(v, n, v, -1, 4);
#else
  (void)n;
  // The last bits of `shifted` are n. Two factors, so that each is a normal number.
  const Ints exponent = (Ints)shifted - (Ints)splat(rounder);
  const Ints first = exponent >> 1;
  const Floats low = (Floats)((first + 127) << 23);
  const Floats high = (Floats)((exponent - first + 127) << 23);
  return v * low * high;
#endif
}

// Reductions over the lanes, always in the same order.

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
  // The exponent's bias is 127 - 15 = 112 less; a multiplication also turns subnormal halves into normal floats.
  const Words finite = (Words)((Floats)magnitude * 0x1p112f);
  return (Floats)(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}

BALCAPRL_INLINE Halves narrow(Floats v, Float16) {
  const Words bits = (Words)v;
  const Words sign = (bits >> 16) & 0x8000u;
  const Words magnitude = bits & 0x7fffffffu;
  // Normal: move the exponent's bias by 112 and round at bit 13; a carry into the exponent is right, up to infinity.
  const Words normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal: adding 0.5 lets the addition round at 2^-24, the spacing of subnormal halves.
  const Words subnormal = (Words)((Floats)magnitude + 0.5f) - (Words)splat(0.5f);
  Words result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x47800000u ? Words{} + 0x7c00u : result;
  result = magnitude > 0x7f800000u ? Words{} + 0x7e00u : result;
  return __builtin_convertvector(sign | result, Halves);
}

// Loads and stores of kLanes values at any alignment; the partial ones touch only the first `count` values.

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

// Lanes from `count` on hold `fill`.
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

// One value, through the same conversions.

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

// e^x within 2 units in the last place, subnormal results included; e^-inf = 0, e^inf = inf, NaN stays NaN.
//
// x = n log 2 + r with |r| <= log(2) / 2; e^r = 1 + r + r^2 q(r), where q is the minimax polynomial of degree 4 for
// the relative error of e^r (3.8e-9 with the rounded coefficients; found by reweighted least squares on Chebyshev nodes).
BALCAPRL_INLINE Floats exp(Floats x) {
  constexpr float kRounder = 0x1.8p23f;
  // Outside these bounds the result is 0 or infinity anyway, and 2^n would not fit in two factors.
  x = max(splat(-104.0f), x);
  x = min(splat(89.0f), x);
  const Floats shifted = x * 0x1.715476p0f + kRounder;
  const Floats n = shifted - kRounder;
  // log 2 in two parts: n times the first is exact.
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
