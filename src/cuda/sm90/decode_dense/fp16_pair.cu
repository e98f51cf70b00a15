// Instantiation of the dense decode kernel: fp16, pairs of CTAs that share pages by multicast.
#include "cuda/sm90/decode_dense/launch.cuh"

namespace flash_mla::cuda::decode_dense {

template Status launch<Traits<__half, 2>>(const KernelParams&, const TensorMaps&, int32_t, int32_t,
                                          cudaStream_t) noexcept;

}  // namespace flash_mla::cuda::decode_dense
