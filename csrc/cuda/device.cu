// Devices as the driver reports them, so that `pycircuit doctor` can tell a missing driver from a CPU-only torch.
#include <cuda_runtime_api.h>

#include <cstring>

#include "cuda/launch.h"

namespace pycircuit {

CudaVersions cuda_versions() {
  CudaVersions v{0, 0};
  cudaRuntimeGetVersion(&v.runtime);
  cudaDriverGetVersion(&v.driver);
  return v;
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

bool device(int i, Device& out) {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) return false;
  static_assert(sizeof properties.name <= sizeof out.name);
  std::memcpy(out.name, properties.name, sizeof properties.name);
  out.major = properties.major;
  out.minor = properties.minor;
  out.multiprocessors = properties.multiProcessorCount;
  out.bytes = static_cast<int64_t>(properties.totalGlobalMem);
  return true;
}

}  // namespace pycircuit
