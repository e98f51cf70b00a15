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

// Of everything but the lengths that the schedule, and a CTA's work items, follow from.
std::uint64_t memo_key(const KernelParams& params, std::int32_t cluster) {
  const ScheduleShape& shape = params.schedule;
  std::uint64_t key = 0x6d6c615f6d656d6f;
  // Steps of splitmix64, by Sebastiano Vigna.
  const auto add = [&key](std::int32_t value) {
    key = (key ^ static_cast<std::uint32_t>(value)) * 0xbf58476d1ce4e5b9;
    key ^= key >> 27;
  };
  for (const std::int32_t value :
       {cluster, std::int32_t{shape.num_parts}, std::int32_t{shape.team}, shape.overhead,
        shape.min_blocks, std::int32_t{shape.split}, shape.levels, shape.rows, params.decode.b,
        params.decode.s_q, params.decode.h_kv, params.decode.max_pages,
        std::int32_t{params.decode.causal}, std::int32_t{params.row_width}}) {
    add(value);
  }
  for (int level = 0; level < kTileLevels; ++level) {
    add(shape.chunks_at[level]);
    add(shape.items_at[level]);
  }
  return key;
}

template <typename Element>
Status launch_for(const KernelParams& params, const DecodeConfig& config, const TensorMaps& maps,
                  std::int32_t device, cudaStream_t stream) noexcept {
  return config.cluster == 2
             ? launch<Traits<Element, 2>>(params, maps, config.ctas, device, stream)
             : launch<Traits<Element, 1>>(params, maps, config.ctas, device, stream);
}

}  // namespace

Status decode(const DecodeParams& decode_params, const DecodeConfig& config,
              const Workspace& workspace, std::int32_t device, StreamHandle stream) noexcept {
  const DeviceGuard guard(device);
  FLASH_MLA_RETURN_IF_ERROR(guard.status());
  KernelParams params;
  params.decode = decode_params;
  params.decode.causal = decode_params.causal && decode_params.s_q > 1;  // one token sees all
  params.schedule = config.schedule;
  constexpr float kLog2e = 1.44269504088896340736f;
  // Finite and not zero: hidden scores stay -inf, and zeros zero.
  params.scale_log2 =
      std::clamp(std::fabs(decode_params.softmax_scale) * kLog2e, std::numeric_limits<float>::min(),
                 std::numeric_limits<float>::max());
  params.negate_scores = decode_params.softmax_scale < 0;
  params.heads_per_kv = decode_params.h_q / decode_params.h_kv;
  const QueryRows rows = query_rows(decode_params);
  params.row_width = rows.width;
  params.rows = rows.count(decode_params);
  params.map_width = rows.dense ? params.rows : rows.width;
  params.prefetch_pages = decode_params.h_kv == 1 && config.schedule.team == 1 &&
                          decode_params.stride_kv_row == kHeadDimQk;
  TensorMaps maps;
  FLASH_MLA_RETURN_IF_ERROR(
      query_tensor_maps(decode_params, rows, &maps.query_half, &maps.query_rope));
  FLASH_MLA_RETURN_IF_ERROR(kv_tensor_maps(decode_params, &maps.half, &maps.rope));
  params.counters = static_cast<Counter*>(workspace.counters);
  params.partials = static_cast<std::byte*>(workspace.partials);
  params.memos = reinterpret_cast<Memo*>(params.partials + config.memos_at);
  params.memo_key = memo_key(params, config.cluster);

  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return decode_params.dtype == DType::kFp16
             ? launch_for<__half>(params, config, maps, device, cuda_stream)
             : launch_for<__nv_bfloat16>(params, config, maps, device, cuda_stream);
}

}  // namespace flash_mla::cuda
