// CUDA runtime errors as Status.
#include "cuda/common/error.h"

#include <cstring>

namespace flash_mla::cuda {
namespace {

StatusCode status_code(cudaError_t error) noexcept {
  switch (error) {
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
      return StatusCode::kUnavailable;
    case cudaErrorInvalidDevice:
      return StatusCode::kInvalidArgument;
    default:
      return StatusCode::kCudaError;
  }
}

}  // namespace

Status cuda_error(cudaError_t error, const char* function, const char* call) noexcept {
  static_cast<void>(cudaGetLastError());
  const int call_name_length = static_cast<int>(std::strcspn(call, "("));
  return Status::error(status_code(error), "%s: %.*s failed: %s (%s)", function, call_name_length,
                       call, cudaGetErrorName(error), cudaGetErrorString(error));
}

}  // namespace flash_mla::cuda
