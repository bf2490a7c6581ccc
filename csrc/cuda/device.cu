// Devices as the driver sees them, so that `pycircuit doctor` can tell a missing driver from a CPU-only torch.
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
  cudaDeviceProp found;
  if (cudaGetDeviceProperties(&found, i) != cudaSuccess) return false;
  static_assert(sizeof found.name <= sizeof out.name);
  std::memcpy(out.name, found.name, sizeof found.name);
  out.major = found.major;
  out.minor = found.minor;
  out.multiprocessors = found.multiProcessorCount;
  out.bytes = static_cast<int64_t>(found.totalGlobalMem);
  return true;
}

}  // namespace pycircuit
