// Functions of the CUDA sources for module.cpp. An op gets a .cu file only once it is measured to beat its Triton
// kernel; until then there are only queries of the device.
#pragma once
#include <cstdint>

namespace pycircuit {

struct Device {
  char name[256];
  int major, minor, multiprocessors;
  int64_t bytes;
};

struct CudaVersions {
  int runtime, driver;  // 1000 * major + 10 * minor; driver 0: none installed
};

CudaVersions cuda_versions();
int device_count();  // 0 without a driver or a device
bool device(int i, Device& out);

}  // namespace pycircuit
