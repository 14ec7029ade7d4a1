// Which instruction set the vector code runs with. Sources in kernels/csrc/simd/ are compiled once per level, each time into
// its own namespace (plain, avx2, avx512); the callers pick one at run time.
#pragma once

#include <cstdint>

namespace balcaprl {

enum SimdLevel : int32_t { kPlain = 0, kAvx2 = 1, kAvx512 = 2 };

// The level in use: the best that this machine and this build have, unless a lower one was asked for.
SimdLevel simd_level();

// One table of functions per level. `Table` is declared in the header of the code that is compiled per level.
template <typename Table>
const Table& for_level(const Table& plain, const Table& avx2, const Table& avx512) {
  const SimdLevel level = simd_level();
  return level == kAvx512 ? avx512 : level == kAvx2 ? avx2 : plain;
}

}  // namespace balcaprl

// Declares, or chooses among, the tables of all levels: BALCAPRL_SIMD_TABLES(SoftmaxTable, softmax_table) in a header, then
// BALCAPRL_SIMD_CHOOSE(softmax_table) where it is used.
#if defined(BALCAPRL_X86_LEVELS)
#define BALCAPRL_SIMD_TABLES(type, name) \
  namespace plain {                      \
  extern const type name;                \
  }                                      \
  namespace avx2 {                       \
  extern const type name;                \
  }                                      \
  namespace avx512 {                     \
  extern const type name;                \
  }
#define BALCAPRL_SIMD_CHOOSE(name) \
  ::balcaprl::for_level(::balcaprl::plain::name, ::balcaprl::avx2::name, ::balcaprl::avx512::name)
#else
#define BALCAPRL_SIMD_TABLES(type, name) \
  namespace plain {                      \
  extern const type name;                \
  }
#define BALCAPRL_SIMD_CHOOSE(name) (::balcaprl::plain::name)
#endif
