// Instantiation of the dense decode kernel: bf16, one CTA per page stream.
#include "cuda/sm90/decode_dense/launch.cuh"

namespace flash_mla::cuda::decode_dense {

template Status launch<Traits<__nv_bfloat16, 1>>(const KernelParams&, const TensorMaps&, int32_t,
                                                 int32_t, cudaStream_t) noexcept;

}  // namespace flash_mla::cuda::decode_dense
