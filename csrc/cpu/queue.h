// Units of work for some threads: each has its own, in order, and takes from others when it is
// done. Processors are seldom equally fast: another process, or its sibling, slows one of them
// down.
//
// Included by what is compiled once for each instruction set: everything is local to its file.
#pragma once

#include <omp.h>

#include <cstdint>

namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE {
namespace {

class Queue {
 public:
  /// Floats of a workspace that `threads` threads need to share their units.
  static int64_t size(int64_t threads) { return threads * LINE; }

  /// Before the threads start.
  static void reset(float* workspace, int64_t threads) {
    for (int64_t t = 0; t < threads; ++t) *begun(workspace, t) = 0;
  }

  Queue(int64_t units, float* workspace, int64_t threads, int64_t thread)
      : units_(units), workspace_(workspace), threads_(threads), thread_(thread), victim_(thread) {}

  /// The next unit, or -1.
  int64_t next() {
    for (; victim_ < thread_ + threads_; ++victim_) {
      const int64_t t = victim_ % threads_;
      const int64_t unit =
          t * units_ / threads_ + __atomic_fetch_add(begun(workspace_, t), 1, __ATOMIC_RELAXED);
      if (unit < (t + 1) * units_ / threads_) return unit;
    }
    return -1;
  }

 private:
  static constexpr int64_t LINE = 16;  // floats to a cache line: a counter on each

  static int64_t* begun(float* workspace, int64_t t) {
    return reinterpret_cast<int64_t*>(workspace + t * LINE);
  }

  int64_t units_;
  float* workspace_;
  int64_t threads_, thread_, victim_;
};

/// Calls body(unit, before, thread) on all units, by at most `threads` threads. `before` is the
/// unit that this thread ran last, or -1. The workspace has Queue::size(threads) floats.
template <class Body>
void for_each_unit(int64_t units, float* workspace, int64_t threads, const Body& body) {
  Queue::reset(workspace, threads);
#pragma omp parallel num_threads(threads) if (units > 1)
  {
    const int64_t thread = omp_get_thread_num();
    Queue queue(units, workspace, threads, thread);
    int64_t before = -1;
    for (int64_t unit; (unit = queue.next()) >= 0; before = unit) body(unit, before, thread);
  }
}

}  // namespace
}  // namespace resnet_fast::cpu::RESNET_FAST_NAMESPACE
