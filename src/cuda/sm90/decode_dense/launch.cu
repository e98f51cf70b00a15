// From validated parameters to a launch: tensor maps, scale, and which instantiation.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/common/device_guard.h"
#include "cuda/common/tensor_map.h"
#include "cuda/cuda.h"
#include "cuda/sm90/decode_dense/launch.h"

namespace flash_mla::cuda {
namespace {

using namespace decode_dense;

template <typename Element>
Status launch_for(const KernelParams& params, const DecodeConfig& config,
                  const CUtensorMap& half_map, const CUtensorMap& rope_map,
                  cudaStream_t stream) noexcept {
  return config.cluster == 2
             ? launch<Traits<Element, 2>>(params, half_map, rope_map, config.ctas, stream)
             : launch<Traits<Element, 1>>(params, half_map, rope_map, config.ctas, stream);
}

}  // namespace

Status decode(const DecodeParams& decode_params, const DecodeConfig& config,
              const Workspace& workspace, std::int32_t device, StreamHandle stream) noexcept {
  const DeviceGuard guard(device);
  FLASH_MLA_RETURN_IF_ERROR(guard.status());
  const CUtensorMap* half_map = nullptr;
  const CUtensorMap* rope_map = nullptr;
  FLASH_MLA_RETURN_IF_ERROR(kv_tensor_maps(decode_params, device, &half_map, &rope_map));

  KernelParams params;
  params.decode = decode_params;
  params.schedule = config.schedule;
  constexpr float kLog2e = 1.44269504088896340736f;
  params.scale_log2 =
      std::max(std::fabs(decode_params.softmax_scale) * kLog2e, std::numeric_limits<float>::min());
  params.negate_scores = decode_params.softmax_scale < 0;
  params.heads_per_kv = decode_params.h_q / decode_params.h_kv;
  params.rows = decode_params.s_q * params.heads_per_kv;
  params.counters = static_cast<Counter*>(workspace.counters);
  params.partials = static_cast<std::byte*>(workspace.partials);

  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return decode_params.dtype == DType::kFp16
             ? launch_for<__half>(params, config, *half_map, *rope_map, cuda_stream)
             : launch_for<__nv_bfloat16>(params, config, *half_map, *rope_map, cuda_stream);
}

}  // namespace flash_mla::cuda
