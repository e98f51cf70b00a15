// What the backend needs to know of a device, asked of the driver once.
#include "cuda/common/properties.h"

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <mutex>

#include "cuda/common/error.h"

namespace flash_mla::cuda {
namespace {

struct Entry {
  std::atomic<bool> ready = false;
  DeviceProperties properties;
};

Status query_device(std::int32_t device, DeviceProperties* properties) noexcept {
  // Single attributes: cudaGetDeviceProperties takes milliseconds and these are asked for on the
  // first call of a decode.
  const struct {
    cudaDeviceAttr attribute;
    std::int32_t* value;
  } wanted[] = {
      {cudaDevAttrComputeCapabilityMajor, &properties->compute_capability_major},
      {cudaDevAttrComputeCapabilityMinor, &properties->compute_capability_minor},
      {cudaDevAttrMultiProcessorCount, &properties->num_sms},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &properties->max_shared_memory},
      {cudaDevAttrL2CacheSize, &properties->l2_cache},
  };
  for (const auto& [attribute, value] : wanted) {
    FLASH_MLA_RETURN_IF_CUDA_ERROR(cudaDeviceGetAttribute(value, attribute, device));
  }
  return {};
}

}  // namespace

Status device_properties(std::int32_t device, const DeviceProperties** properties) noexcept {
  static std::array<Entry, kMaxDevices> entries;
  static std::mutex mutex;

  if (device < 0 || device >= kMaxDevices) {
    return Status::error(StatusCode::kInvalidArgument,
                         "device_properties: device = %d, wanted 0 .. %d", device, kMaxDevices - 1);
  }
  Entry& entry = entries[static_cast<std::size_t>(device)];
  if (!entry.ready.load(std::memory_order_acquire)) {
    const std::lock_guard lock(mutex);
    if (!entry.ready.load(std::memory_order_relaxed)) {
      FLASH_MLA_RETURN_IF_ERROR(query_device(device, &entry.properties));
      entry.ready.store(true, std::memory_order_release);
    }
  }
  *properties = &entry.properties;
  return {};
}

}  // namespace flash_mla::cuda
