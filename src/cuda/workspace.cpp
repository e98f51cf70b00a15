// init_workspace: zeroes the counters of a decode's workspace.
#include <cuda_runtime_api.h>

#include "cuda/common/device_guard.h"
#include "cuda/common/error.h"
#include "cuda/cuda.h"

namespace flash_mla::cuda {

Status init_workspace(const Workspace& workspace, std::int32_t device,
                      StreamHandle stream) noexcept {
  if (workspace.counters_size == 0) return {};
  const DeviceGuard guard(device);
  FLASH_MLA_RETURN_IF_ERROR(guard.status());
  FLASH_MLA_RETURN_IF_CUDA_ERROR(cudaMemsetAsync(workspace.counters, 0, workspace.counters_size,
                                                 static_cast<cudaStream_t>(stream)));
  return {};
}

}  // namespace flash_mla::cuda
