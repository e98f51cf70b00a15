// The CUDA devices of this machine and whether the kernels run on them.
#include <cuda_runtime_api.h>

#include <cstdio>

#include "cuda/common/error.h"
#include "cuda/common/properties.h"
#include "cuda/cuda.h"

namespace flash_mla::cuda {
namespace {

// Devices the driver shows. No driver, or one too old for the toolkit of this build, is
// kUnavailable.
Status count_devices(std::int32_t* count) noexcept {
  *count = 0;
  const cudaError_t error = cudaGetDeviceCount(count);
  if (error == cudaSuccess && *count > 0) return {};
  *count = 0;
  static_cast<void>(cudaGetLastError());
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  if (error == cudaErrorInsufficientDriver && driver > 0) {
    return Status::error(
        StatusCode::kUnavailable,
        "cuda_device_info: the driver supports CUDA %d.%d, this build needs a driver "
        "for CUDA %d; update the NVIDIA driver",
        driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000);
  }
  if (driver == 0) {
    return Status::error(StatusCode::kUnavailable,
                         "cuda_device_info: no NVIDIA driver on this machine");
  }
  return Status::error(StatusCode::kUnavailable, "cuda_device_info: no CUDA device visible (%s)",
                       cudaGetErrorString(error == cudaSuccess ? cudaErrorNoDevice : error));
}

}  // namespace

std::int32_t device_count() noexcept {
  std::int32_t count = 0;
  return count_devices(&count).ok() ? count : 0;
}

Status device_info(std::int32_t device, CudaDeviceInfo* info) noexcept {
  *info = {};
  std::int32_t count = 0;
  FLASH_MLA_RETURN_IF_ERROR(count_devices(&count));
  if (device < 0 || device >= count) {
    return Status::error(StatusCode::kInvalidArgument,
                         "cuda_device_info: device = %d, wanted 0 .. %d", device, count - 1);
  }
  const DeviceProperties* properties = nullptr;
  FLASH_MLA_RETURN_IF_ERROR(device_properties(device, &properties));
  cudaDeviceProp prop;
  FLASH_MLA_RETURN_IF_CUDA_ERROR(cudaGetDeviceProperties(&prop, device));
  FLASH_MLA_RETURN_IF_CUDA_ERROR(cudaDriverGetVersion(&info->driver_version));

  std::snprintf(info->name, sizeof(info->name), "%.127s", prop.name);
  info->compute_capability_major = properties->compute_capability_major;
  info->compute_capability_minor = properties->compute_capability_minor;
  info->num_sms = properties->num_sms;
  info->memory = static_cast<std::int64_t>(prop.totalGlobalMem);
  info->supported = is_hopper(*properties);
  if (!info->supported) {
    std::snprintf(
        info->why_not, sizeof(info->why_not),
        "compute capability %d.%d; the kernels are built for 9.0 (Hopper: H100, H200, H800, H20)",
        info->compute_capability_major, info->compute_capability_minor);
  }
  return {};
}

}  // namespace flash_mla::cuda
