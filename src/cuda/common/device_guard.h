// Makes a device current for a scope.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/error.h"
#include "flash_mla/status.h"

namespace flash_mla::cuda {

// Restores the caller's device on exit; costs one cudaGetDevice when it is current already. Check
// status() before use.
class DeviceGuard {
 public:
  explicit DeviceGuard(std::int32_t device) noexcept : status_(set_device(device)) {}
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(previous_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  [[nodiscard]] const Status& status() const noexcept { return status_; }

 private:
  Status set_device(std::int32_t device) noexcept {
    FLASH_MLA_RETURN_IF_CUDA_ERROR(cudaGetDevice(&previous_));
    if (previous_ == device) return {};
    FLASH_MLA_RETURN_IF_CUDA_ERROR(cudaSetDevice(device));
    changed_ = true;
    return {};
  }

  int previous_ = 0;
  bool changed_ = false;
  Status status_;  // last: set_device() writes the members above
};

}  // namespace flash_mla::cuda
