// The instructions of csrc/cuda/ptx.cuh, as the machine executes them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SITE cuda_on_cpu::Site site = cuda_on_cpu::Site::here()

namespace resnet_fast::cuda {

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(cuda_on_cpu::dynamic_shared());
}

inline void cp_async_16(void* smem, const void* gmem, bool valid = true, SITE) {
  cuda_on_cpu::cp_async_16(smem, gmem, valid, site);
}

inline void cp_async_commit() { cuda_on_cpu::cp_async_commit(); }

template <int GROUPS_LEFT>
void cp_async_wait() {
  cuda_on_cpu::cp_async_wait(GROUPS_LEFT);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, SITE) {
  cuda_on_cpu::ldmatrix_x4(r, row, false, site);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, SITE) {
  cuda_on_cpu::ldmatrix_x4(r, row, true, site);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SITE) {
  const auto to_float = [](uint16_t bits) -> float { return cuda_on_cpu::same_bits<T>(bits); };
  cuda_on_cpu::mma_m16n8k16(d, a, b, to_float, site);
}

}  // namespace resnet_fast::cuda

#undef SITE
