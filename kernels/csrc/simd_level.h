// Selects the instruction set of the vector code. The sources in kernels/csrc/simd/ are compiled once per level, each
// time into a namespace of its own (plain, avx2, avx512), and callers choose a level at run time.
#pragma once

#include <cstdint>

namespace balcaprl {

enum SimdLevel : int32_t { kPlain = 0, kAvx2 = 1, kAvx512 = 2 };

// Returns the level in use: the best that this machine and this build support, unless a lower one was asked for.
SimdLevel simd_level();

// Returns the table of functions of the level in use, given those of all levels. `Table` is declared by the header of
// the code that is compiled per level.
template <typename Table>
const Table& for_level(const Table& plain, const Table& avx2, const Table& avx512) {
  const SimdLevel level = simd_level();
  return level == kAvx512 ? avx512 : level == kAvx2 ? avx2 : plain;
}

}  // namespace balcaprl

// A header declares the tables of all levels with BALCAPRL_SIMD_TABLES(SoftmaxTable, softmax_table). A caller gets the
// table of the level in use with BALCAPRL_SIMD_CHOOSE(softmax_table).
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
