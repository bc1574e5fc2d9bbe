// Whether a driver is there that can serve the CUDA runtime linked into this module.
#include <cuda_runtime_api.h>

#include "../resnet_fast.h"

namespace resnet_fast::cuda {
namespace {

std::string version_name(int version) {  // 13020 is 13.2
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

std::string driver_ok() {
  int driver = 0, runtime = 0;
  cudaError_t error = cudaRuntimeGetVersion(&runtime);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (driver == 0) return "no NVIDIA driver is installed";
  // Within a major version any driver runs any runtime.
  if (driver / 1000 < runtime / 1000) {
    return "the NVIDIA driver supports CUDA " + version_name(driver) +
           ", this build of resnet_fast needs CUDA " + version_name(runtime / 1000 * 1000) +
           ": update the driver, or rebuild with its CUDA toolkit";
  }
  return "";
}

}  // namespace resnet_fast::cuda
