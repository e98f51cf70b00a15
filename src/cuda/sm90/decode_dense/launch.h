// Host side of the dense decode kernel: one launch function per instantiation
// (<dtype>_<single|pair>.cu).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/sm90/decode_dense/traits.h"
#include "flash_mla/status.h"

namespace flash_mla::cuda::decode_dense {

// T: Traits<__nv_bfloat16 or __half, 1 or 2>. `ctas` is a multiple of T::kCluster. The device is
// current.
template <typename T>
Status launch(const KernelParams& params, const TensorMaps& maps, int32_t ctas, int32_t device,
              cudaStream_t stream) noexcept;

}  // namespace flash_mla::cuda::decode_dense
