#include "simd_level.h"

#include <atomic>

#include "native.h"

namespace balcaprl {
namespace {

SimdLevel best_level() {
#if defined(BALCAPRL_X86_LEVELS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return kAvx512;
  if (avx2) return kAvx2;
#endif
  return kPlain;
}

std::atomic<int32_t> current_level{-1};

}  // namespace

SimdLevel simd_level() {
  int32_t level = current_level.load(std::memory_order_relaxed);
  if (level < 0) {
    level = best_level();
    current_level.store(level, std::memory_order_relaxed);
  }
  return static_cast<SimdLevel>(level);
}

}  // namespace balcaprl

// Sets the highest level to use (0 plain, 1 AVX2, 2 AVX-512); a negative number sets no limit. Returns the level that
// is used from now on: the best within the limit that this machine and this build support.
BALCAPRL_EXPORT int32_t balcaprl_set_simd_level(int32_t wanted) {
  const int32_t best = balcaprl::best_level();
  const int32_t level = wanted < 0 || wanted > best ? best : wanted;
  balcaprl::current_level.store(level, std::memory_order_relaxed);
  return level;
}
