// What CUDA's headers, as they stand beside this file, need of the machine that runs the threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "vector_types.h"

namespace cuda_on_cpu {

/// A line of the kernel's source. As a default argument it is the caller's: two barriers are told
/// apart by it, however often the compiler copied them.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

/// Of the thread that runs now.
struct Indices {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Indices indices;

struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t dynamic_shared;
  void (*body)(void*);  // the kernel's call, for one thread
  void* arguments;
  size_t arguments_size;
};

/// Runs every thread of every block. Throws Fault at the first thing that a GPU would not forgive.
void run(const Launch& launch);

/// All threads of the block meet; returns how many came with a predicate that holds.
int syncthreads(bool predicate, Site site);
void* dynamic_shared();

void syncwarp(unsigned mask, Site site);
void shuffle(unsigned mask, const void* value, void* result, size_t size, int source_lane,
             Site site);
unsigned ballot(unsigned mask, bool predicate, Site site);

/// Before an atomic operation on `size` bytes at `p`.
void atomic_access(const void* p, size_t size, Site site);

void cp_async_16(void* smem, const void* gmem, bool valid, Site site);
void cp_async_commit();
void cp_async_wait(int groups_left);
void ldmatrix_x4(uint32_t* r, const void* row, bool trans, Site site);

using ToFloat = float (*)(uint16_t bits);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, ToFloat to_float, Site site);

}  // namespace cuda_on_cpu
