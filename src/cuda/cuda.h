// The CUDA backend's entry points, free of CUDA headers. Arguments are validated by src/api. Each
// call runs on `device`, restores the caller's current device, and never synchronises or allocates
// device memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/params.h"
#include "core/schedule.h"
#include "flash_mla/backend.h"
#include "flash_mla/decode.h"
#include "flash_mla/status.h"

namespace flash_mla::cuda {

// The variant chosen for a shape on a device: from shapes only, so CUDA graphs stay valid.
// Printable (describe_decode).
struct DecodeConfig {
  ScheduleShape schedule;
  std::int32_t cluster = 1;  // CTAs that share every page by multicast: 1 or 2, 64 query rows each
  std::int32_t ctas = 0;     // grid: num_parts * team * cluster
  std::size_t counters_size = 0, partials_size = 0;  // bytes of workspace
  std::size_t memos_at = 0;  // where in `partials` that begins which CTAs remember between calls
};

// Reads shapes, dtype and `split` of params. kUnavailable when the device is not Hopper,
// kUnsupported for a page_size other than 64.
Status decode_config(const DecodeParams& params, std::int32_t device,
                     DecodeConfig* config) noexcept;

Status decode(const DecodeParams& params, const DecodeConfig& config, const Workspace& workspace,
              std::int32_t device, StreamHandle stream) noexcept;
Status plan_decode(const DecodeParams& params, const DecodeConfig& config, const PlanParams& plan,
                   std::int32_t device, StreamHandle stream) noexcept;
Status init_workspace(const Workspace& workspace, std::int32_t device,
                      StreamHandle stream) noexcept;
// The opt-in check of lengths and page numbers; synchronises, refused under capture. Uses the head
// of workspace.partials as scratch.
Status validate_decode(const DecodeParams& params, const Workspace& workspace, std::int32_t device,
                       StreamHandle stream) noexcept;
Status append_kv(const AppendKvParams& params, std::int32_t device, StreamHandle stream) noexcept;
Status merge_states(const MergeStatesParams& params, std::int32_t device,
                    StreamHandle stream) noexcept;

std::int32_t device_count() noexcept;
Status device_info(std::int32_t device, CudaDeviceInfo* info) noexcept;

}  // namespace flash_mla::cuda
