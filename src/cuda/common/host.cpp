// Host-side help for callers of the backend: stream capture, and device memory for counters.
#include "cuda/common/host.h"

#include <cuda_runtime_api.h>

#include <array>
#include <mutex>

#include "cuda/common/device_guard.h"
#include "cuda/common/error.h"
#include "cuda/common/properties.h"

namespace flash_mla::cuda {
namespace {

constexpr std::size_t kSlabBytes = std::size_t{1} << 20;
constexpr std::size_t kAlignment = 256;

// What is left of a device's current slab.
struct Slab {
  std::byte* next = nullptr;
  std::size_t left = 0;
};

// Lets this thread allocate while a capture is under way.
class RelaxedCapture {
 public:
  RelaxedCapture() noexcept { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Zeroes `memory` on `stream` and waits for it.
Status zero_memory(void* memory, std::size_t bytes, cudaStream_t stream) noexcept {
  FLASH_MLA_RETURN_IF_CUDA_ERROR(cudaMemsetAsync(memory, 0, bytes, stream));
  FLASH_MLA_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream));
  return {};
}

// Zeroed memory from cudaMalloc on the current device. The private stream keeps the memset out of
// the caller's capture and does not wait for the legacy stream.
Status allocate_slab(std::size_t bytes, Slab* slab) noexcept {
  const RelaxedCapture relaxed;
  cudaStream_t stream = nullptr;
  FLASH_MLA_RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, bytes);
  Status status = error == cudaSuccess ? zero_memory(memory, bytes, stream)
                                       : cuda_error(error, "allocate_counters", "cudaMalloc");
  static_cast<void>(cudaStreamDestroy(stream));
  if (!status.ok()) {
    if (memory != nullptr) static_cast<void>(cudaFree(memory));
    return status;
  }
  *slab = {static_cast<std::byte*>(memory), bytes};
  return {};
}

}  // namespace

bool is_capturing(StreamHandle stream, std::uint64_t* capture_id) noexcept {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  if (cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id) != cudaSuccess) {
    // The legacy stream while another one is captured: it is not captured itself, and its next use
    // reports the error.
    static_cast<void>(cudaGetLastError());
    return false;
  }
  if (status != cudaStreamCaptureStatusActive) return false;
  if (capture_id != nullptr) *capture_id = id;
  return true;
}

Status allocate_counters(std::int32_t device, std::size_t bytes, void** out) noexcept {
  static std::array<Slab, kMaxDevices> slabs;
  static std::mutex mutex;

  *out = nullptr;
  if (device < 0 || device >= kMaxDevices) {
    return Status::error(StatusCode::kInvalidArgument,
                         "allocate_counters: device = %d, wanted 0 .. %d", device, kMaxDevices - 1);
  }
  const DeviceGuard guard(device);
  FLASH_MLA_RETURN_IF_ERROR(guard.status());
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;

  if (bytes >= kSlabBytes) {  // the slab stays for the small ones
    Slab own;
    FLASH_MLA_RETURN_IF_ERROR(allocate_slab(bytes, &own));
    *out = own.next;
    return {};
  }
  const std::lock_guard lock(mutex);
  Slab& slab = slabs[static_cast<std::size_t>(device)];
  if (slab.left < bytes) {
    FLASH_MLA_RETURN_IF_ERROR(allocate_slab(kSlabBytes, &slab));
  }
  *out = slab.next;
  slab.next += bytes;
  slab.left -= bytes;
  return {};
}

}  // namespace flash_mla::cuda
