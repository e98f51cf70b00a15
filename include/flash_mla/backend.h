// What this build and this machine can run.
#pragma once

#include <cstddef>
#include <cstdint>

#include "flash_mla/status.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

// True when the library was built with its CUDA backend.
[[nodiscard]] bool built_with_cuda() noexcept;
// CUDA toolkit of the build as 13000 for 13.0; 0 without CUDA.
[[nodiscard]] std::int32_t cuda_build_version() noexcept;
// CUDA devices that the driver shows; 0 without a driver or without CUDA in the build. Never fails.
[[nodiscard]] std::int32_t cuda_device_count() noexcept;
// Instruction set the CPU backend chose on this machine: "avx512", "avx2", "baseline", ...
// FLASH_MLA_CPU_ISA in the environment, read once, asks for a lesser one.
[[nodiscard]] const char* cpu_isa() noexcept;
// Threads the CPU backend uses: FLASH_MLA_NUM_THREADS, else OMP_NUM_THREADS, else the cores this
// process may run on.
[[nodiscard]] std::int32_t cpu_num_threads() noexcept;
// Sets it for the process, 1 or more. Python keeps it equal to torch.get_num_threads().
Status set_cpu_num_threads(std::int32_t num_threads) noexcept;

struct CudaDeviceInfo {
  char name[128] = {};
  std::int32_t compute_capability_major = 0;
  std::int32_t compute_capability_minor = 0;
  std::int32_t num_sms = 0;
  std::int64_t memory = 0;          // bytes
  std::int32_t driver_version = 0;  // 13000 for 13.0
  bool supported = false;           // the sm_90a kernels run on it
  char why_not[160] = {};           // when not
};

// Errors: kUnavailable (no CUDA in the build, no driver), kInvalidArgument (no such device),
// kCudaError.
Status cuda_device_info(std::int32_t device, CudaDeviceInfo* info) noexcept;

}  // namespace flash_mla
