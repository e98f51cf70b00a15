// What the backend needs to know of a device, asked of the driver once.
#pragma once

#include <cstdint>

#include "flash_mla/status.h"

namespace flash_mla::cuda {

// Devices that the per-device tables of this backend have room for.
inline constexpr std::int32_t kMaxDevices = 128;

struct DeviceProperties {
  std::int32_t compute_capability_major = 0;
  std::int32_t compute_capability_minor = 0;
  std::int32_t num_sms = 0;
  std::int32_t max_shared_memory = 0;  // bytes a CTA may opt in to
  std::int32_t l2_cache = 0;           // bytes
};

// The kernels are built for sm_90a, which runs on compute capability 9.0 and nothing else.
[[nodiscard]] inline bool is_hopper(const DeviceProperties& properties) noexcept {
  return properties.compute_capability_major == 9 && properties.compute_capability_minor == 0;
}

// Points `*properties` at an entry that stays valid and constant for the life of the process.
// Thread-safe; a failure is not remembered. Errors: kInvalidArgument (no such ordinal),
// kUnavailable (no driver), kCudaError.
Status device_properties(std::int32_t device, const DeviceProperties** properties) noexcept;

}  // namespace flash_mla::cuda
