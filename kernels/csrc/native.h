// What every file of the native library shares: the export mark, the status codes, the version of the C interface.
//
// Conventions: plain C interface, row-major contiguous arrays, sizes as int64_t, no exception leaves a function, the caller
// owns all memory. Each function returns a Status; kernels/ops/native.py turns it into a Python error.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define BALCAPRL_EXPORT extern "C" __declspec(dllexport)
#else
#define BALCAPRL_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace balcaprl {

// Raise it with every change of a signature, a status code or an enumeration, here and in kernels/ops/native.py.
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
