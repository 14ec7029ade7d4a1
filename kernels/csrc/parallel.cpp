#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "native.h"

namespace balcaprl {
namespace {

// Entry points of GCC's OpenMP runtime, which Intel's and LLVM's runtimes offer too.
using GompParallel = void (*)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
using MaxThreads = int (*)();

std::atomic<GompParallel> gomp_parallel{nullptr};
std::atomic<MaxThreads> max_threads{nullptr};

// Number of threads that run_blocks uses if there are enough blocks.
int64_t num_threads() {
  const MaxThreads ask = max_threads.load(std::memory_order_acquire);
  return gomp_parallel.load(std::memory_order_acquire) == nullptr || ask == nullptr ? 1 : ask();
}

struct Team {
  int64_t num_blocks;
  Block body;
  const void* context;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t block = next++; block < num_blocks; block = next++) body(context, block);
  }
};

}  // namespace

void run_blocks(int64_t num_blocks, Block body, const void* context) noexcept {
  const int64_t available = num_blocks > 1 ? num_threads() : 1;
  if (available <= 1) {
    for (int64_t block = 0; block < num_blocks; ++block) body(context, block);
    return;
  }
  Team team{num_blocks, body, context};
  const auto size = static_cast<unsigned>(available < num_blocks ? available : num_blocks);
  gomp_parallel.load(std::memory_order_acquire)([](void* data) { static_cast<Team*>(data)->work(); }, &team, size, 0);
}

}  // namespace balcaprl

// Sets the addresses of GOMP_parallel and omp_get_max_threads in the runtime that torch uses. If one of them is null,
// all blocks run on the calling thread.
BALCAPRL_EXPORT void balcaprl_set_thread_runtime(void* parallel, void* maximum) {
  balcaprl::max_threads.store(reinterpret_cast<balcaprl::MaxThreads>(maximum), std::memory_order_release);
  balcaprl::gomp_parallel.store(reinterpret_cast<balcaprl::GompParallel>(parallel), std::memory_order_release);
}

// Runs num_blocks test blocks. visits[b] becomes the number of times that block b ran, and runners[b] an address that
// identifies its thread. The first blocks wait for each other, for at most one second, so that a thread that wakes
// slowly still gets a block.
BALCAPRL_EXPORT int32_t balcaprl_probe_threads(int64_t num_blocks, int64_t* visits, int64_t* runners) {
  using Clock = std::chrono::steady_clock;
  const int64_t team = std::min(num_blocks, balcaprl::num_threads());
  std::atomic<int64_t> started{0};
  for (int64_t block = 0; block < num_blocks; ++block) visits[block] = 0;
  balcaprl::parallel_for(num_blocks, [&](int64_t block) {
    thread_local char mark;
    visits[block] += 1;
    runners[block] = reinterpret_cast<int64_t>(&mark);
    const auto deadline = Clock::now() + std::chrono::seconds(1);
    for (++started; started < team && Clock::now() < deadline;) std::this_thread::yield();
  });
  return balcaprl::kOk;
}
