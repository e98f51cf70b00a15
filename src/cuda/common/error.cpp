// CUDA runtime errors as Status.
#include "cuda/common/error.h"

#include <cstring>

namespace flash_mla::cuda {

Status cuda_error(cudaError_t error, const char* function, const char* call) noexcept {
  static_cast<void>(cudaGetLastError());
  const int call_name_length = static_cast<int>(std::strcspn(call, "("));
  return Status::error(StatusCode::kCudaError, "%s: %.*s failed: %s (%s)", function,
                       call_name_length, call, cudaGetErrorName(error), cudaGetErrorString(error));
}

}  // namespace flash_mla::cuda
