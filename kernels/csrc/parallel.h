// parallel_for: blocks of work over the threads that torch's own kernels run on.
//
// The library links no OpenMP: a second runtime in the process would keep a second team of threads, and the two would push
// each other off the cores. kernels/ops/native.py looks up GOMP_parallel in the runtime that torch uses (libgomp, or Intel's
// or LLVM's, which offer the same entry) and hands it over. Without it the blocks run one after the other.
//
// Results must not depend on the number of threads: cut the work in blocks of a fixed size, let each block write what
// belongs to it alone (a partial sum goes to a slot of its own), and add the slots up in their order afterwards.
#pragma once

#include <cstdint>

namespace balcaprl {

using Block = void (*)(const void* context, int64_t block);

// Calls body(context, b) once for each b in [0, num_blocks), in any order, and returns when all are done. The body must not
// throw. Inside of another parallel region it runs on the calling thread.
void run_blocks(int64_t num_blocks, Block body, const void* context) noexcept;

// The same for a callable: parallel_for(n, [&](int64_t block) { ... }).
template <typename Body>
void parallel_for(int64_t num_blocks, const Body& body) noexcept {
  run_blocks(num_blocks, [](const void* context, int64_t block) { (*static_cast<const Body*>(context))(block); }, &body);
}

}  // namespace balcaprl
