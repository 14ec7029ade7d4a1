// Definitions that every file of the native library shares: the export macro, the status codes and the version of the C
// interface.
//
// Conventions: plain C interface, row-major contiguous arrays, sizes as int64_t. No exception leaves a function, and
// the caller owns all memory. A function that can fail returns a Status, which kernels/ops turns into a Python error.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define BALCAPRL_EXPORT extern "C" __declspec(dllexport)
#else
#define BALCAPRL_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace balcaprl {

// Increase this version, here and in kernels/ops/support/native.py, when a signature, a status code or an enumeration
// changes.
constexpr int32_t kAbiVersion = 3;

enum Status : int32_t {
  kOk = 0,
  kOutOfMemory = 1,
  kBadRewards = 2,
  kBadWeights = 3,
  kBadLengths = 4,
  kBadReferenceLengths = 5,
  kBadLogits = 6,
  kBadTargets = 7,
  kBadOffsets = 8,
  kBadValues = 9,
};

}  // namespace balcaprl
