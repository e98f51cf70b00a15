// What this build and this machine can run.
#include "flash_mla/backend.h"

#include "cpu/cpu.h"
#ifdef FLASH_MLA_WITH_CUDA
#include "cuda/cuda.h"
#endif

namespace flash_mla {

#ifdef FLASH_MLA_WITH_CUDA

bool built_with_cuda() noexcept { return true; }

std::int32_t cuda_build_version() noexcept { return FLASH_MLA_CUDA_VERSION; }

std::int32_t cuda_device_count() noexcept { return cuda::device_count(); }

Status cuda_device_info(std::int32_t device, CudaDeviceInfo* info) noexcept {
  if (info == nullptr) {
    return Status::error(StatusCode::kInvalidArgument, "cuda_device_info: info = null");
  }
  return cuda::device_info(device, info);
}

#else

bool built_with_cuda() noexcept { return false; }

std::int32_t cuda_build_version() noexcept { return 0; }

std::int32_t cuda_device_count() noexcept { return 0; }

Status cuda_device_info(std::int32_t, CudaDeviceInfo* info) noexcept {
  if (info == nullptr) {
    return Status::error(StatusCode::kInvalidArgument, "cuda_device_info: info = null");
  }
  return Status::error(StatusCode::kUnavailable,
                       "cuda_device_info: this build has no CUDA backend; rebuild with nvcc");
}

#endif

const char* cpu_isa() noexcept { return cpu::isa(); }

std::int32_t cpu_num_threads() noexcept { return cpu::num_threads(); }

Status set_cpu_num_threads(std::int32_t num_threads) noexcept {
  if (num_threads < 1) {
    return Status::error(StatusCode::kInvalidArgument,
                         "set_cpu_num_threads: num_threads = %d, wanted 1 or more", num_threads);
  }
  cpu::set_num_threads(num_threads);
  return {};
}

}  // namespace flash_mla
