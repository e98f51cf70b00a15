// CUDA runtime errors as Status.
#pragma once

#include <cuda_runtime_api.h>

#include "flash_mla/status.h"

namespace flash_mla::cuda {

// `error` must not be cudaSuccess. The code is kUnavailable for no driver, one too old or no
// device, kInvalidArgument for an ordinal that does not exist, else kCudaError. The message names
// `function`, the call that failed (the text of `call` up to its opening parenthesis), the error's
// name and its description. Takes the error off the runtime's per-thread record, so that a later,
// unrelated cudaGetLastError() of the caller does not see it.
Status cuda_error(cudaError_t error, const char* function, const char* call) noexcept;

}  // namespace flash_mla::cuda

// Returns cuda_error() from the enclosing function when the CUDA runtime call does not succeed.
#define FLASH_MLA_RETURN_IF_CUDA_ERROR(call)                         \
  do {                                                               \
    if (const cudaError_t error_ = (call); error_ != cudaSuccess) {  \
      return ::flash_mla::cuda::cuda_error(error_, __func__, #call); \
    }                                                                \
  } while (false)
