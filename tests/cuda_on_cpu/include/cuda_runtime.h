// CUDA C++ as far as csrc uses it, for g++.
#pragma once

#include <cmath>
#include <cstring>
#include <tuple>

#include "cuda_on_cpu.h"
#include "cuda_runtime_api.h"
#include "device_functions.h"

#define __host__
#define __device__
#define __global__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))

// Blocks run one after another, so one copy serves all. The machine forgets between two blocks
// which bytes were written.
#define __shared__ static

inline constexpr const uint3& threadIdx = cuda_on_cpu::indices.thread;
inline constexpr const uint3& blockIdx = cuda_on_cpu::indices.block;
inline constexpr const dim3& blockDim = cuda_on_cpu::indices.block_size;
inline constexpr const dim3& gridDim = cuda_on_cpu::indices.grid_size;

namespace cuda_on_cpu {

template <class... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> arguments;

  static void body(void* self) {
    Call& call = *static_cast<Call*>(self);
    std::apply(call.kernel, call.arguments);
  }
};

}  // namespace cuda_on_cpu

template <class... Parameters, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Args&&... args) {
  const void* address = reinterpret_cast<const void*>(kernel);
  const cudaError_t error = cuda_on_cpu::check_configuration(address, *config);
  if (error != cudaSuccess) return error;
  cuda_on_cpu::Call<Parameters...> call{kernel, {static_cast<Parameters>(args)...}};
  cuda_on_cpu::run({address, config->gridDim, config->blockDim, config->dynamicSmemBytes, call.body,
                    &call, sizeof call});
  return cudaSuccess;
}
