// parallel_for runs blocks of work on the threads that torch's own kernels use.
//
// The library does not link OpenMP. A second runtime in the process would keep a second team of threads, and the two
// teams would compete for the cores. kernels/ops/support/native.py looks up GOMP_parallel in the runtime that torch
// uses (libgomp, or Intel's or LLVM's runtime, which offer the same entry point) and passes its address to the library.
// Without an address the blocks run one after another.
//
// Results must not depend on the number of threads. To ensure this, cut the work into blocks of a fixed size, let each
// block write only its own memory (a partial sum goes to a slot of its own), and add up the slots in order afterwards.
#pragma once

#include <cstdint>

namespace balcaprl {

using Block = void (*)(const void* context, int64_t block);

// Calls body(context, b) once for each b in [0, num_blocks), in any order, and returns when all calls are done. The
// body must not throw. Inside another parallel region all calls run on the calling thread.
void run_blocks(int64_t num_blocks, Block body, const void* context) noexcept;

// Does the same as run_blocks for a callable: parallel_for(n, [&](int64_t block) { ... }).
template <typename Body>
void parallel_for(int64_t num_blocks, const Body& body) noexcept {
  run_blocks(num_blocks, [](const void* context, int64_t block) { (*static_cast<const Body*>(context))(block); }, &body);
}

}  // namespace balcaprl
