// The decode functions: check the arguments, choose the backend, call it.
#include "flash_mla/decode.h"

#include <algorithm>
#include <cstdio>
#include <limits>

#include "api/validate.h"
#include "core/params.h"
#include "core/schedule.h"
#include "cpu/cpu.h"
#include "flash_mla/backend.h"
#ifdef FLASH_MLA_WITH_CUDA
#include "cuda/common/properties.h"
#include "cuda/cuda.h"
#endif

namespace flash_mla {
namespace {

using api::check_decode;
using api::check_plan;
using api::check_workspace;
using api::DecodeCheck;

bool has_rows(const DecodeParams& params) {
  return params.b > 0 && params.s_q > 0 && params.h_q > 0;
}

Status check_pointer(const char* function, const char* name, const void* pointer) {
  if (pointer != nullptr) return {};
  return Status::error(StatusCode::kInvalidArgument, "%s: %s = null, wanted a pointer", function,
                       name);
}

Status check_plan_rows(const char* function, std::int32_t rows, std::int32_t wanted) {
  if (rows == wanted) return {};
  return Status::error(StatusCode::kInvalidArgument,
                       "%s: plan.metadata.shape[0] (num_parts) = %d, wanted %d (see plan_size)",
                       function, rows, wanted);
}

#ifdef FLASH_MLA_WITH_CUDA

bool on_cuda(const DecodeArgs& args) { return args.q.device.type == DeviceType::kCuda; }

// The planner counts costs in 32 bits: the worst that these shapes can hold has to fit.
Status check_schedule_cost(const char* function, const DecodeParams& params,
                           const cuda::DecodeConfig& config) {
  const std::int64_t most_blocks = std::max<std::int64_t>(
      1, ceil_div(std::int64_t{params.max_pages} * params.page_size, std::int64_t{kBlockTokens}));
  const std::int64_t most_cost =
      Schedule::request_cost(config.schedule, static_cast<std::int32_t>(most_blocks));
  if (params.b == 0 || most_cost < kMostScheduleCost / params.b) return {};
  return Status::error(StatusCode::kInvalidArgument,
                       "%s: block_table.shape = [%d, %d], too many pages for %d KV heads; use "
                       "fewer columns (max_pages) or requests",
                       function, params.b, params.max_pages, params.h_kv);
}

// A plan may come from other shapes, since it is a hint; but no plan of ours has more rows than the
// device has SMs.
Status check_hint_rows(std::int32_t rows, const cuda::DecodeConfig& config, std::int32_t device) {
  if (rows == 1 || rows == config.schedule.num_parts) return {};
  const cuda::DeviceProperties* properties = nullptr;
  FLASH_MLA_RETURN_IF_ERROR(cuda::device_properties(device, &properties));
  if (rows <= properties->num_sms) return {};
  return Status::error(
      StatusCode::kInvalidArgument,
      "decode: plan.metadata.shape[0] (num_parts) = %d, wanted %d, or 1 .. %d (SMs); see plan_size",
      rows, static_cast<int>(config.schedule.num_parts), properties->num_sms);
}

Status decode_on_cuda(const DecodeArgs& args, const DecodePlan* plan, std::int32_t plan_rows,
                      const Workspace& workspace, DecodeParams params, StreamHandle stream) {
  const std::int32_t device = args.q.device.index;
  if (plan_rows == 1) params.split = false;  // one row means "do not split"
  cuda::DecodeConfig config;
  FLASH_MLA_RETURN_IF_ERROR(cuda::decode_config(params, device, &config));
  FLASH_MLA_RETURN_IF_ERROR(check_schedule_cost("decode", params, config));
  if (plan != nullptr) FLASH_MLA_RETURN_IF_ERROR(check_hint_rows(plan_rows, config, device));
  if (!has_rows(params)) return {};
  FLASH_MLA_RETURN_IF_ERROR(
      check_workspace("decode", workspace, config.counters_size, config.partials_size));
  if (args.validate) {
    FLASH_MLA_RETURN_IF_ERROR(cuda::validate_decode(params, workspace, device, stream));
  }
  return cuda::decode(params, config, workspace, device, stream);
}

#endif

}  // namespace

Status plan_size(const DecodeArgs& args, std::int32_t* num_parts) noexcept {
  FLASH_MLA_RETURN_IF_ERROR(check_pointer("plan_size", "num_parts", num_parts));
  DecodeParams params;
  FLASH_MLA_RETURN_IF_ERROR(check_decode("plan_size", args, DecodeCheck::kSizes, &params));
  std::int32_t parts = 1;
#ifdef FLASH_MLA_WITH_CUDA
  if (on_cuda(args)) {
    cuda::DecodeConfig config;
    FLASH_MLA_RETURN_IF_ERROR(cuda::decode_config(params, args.q.device.index, &config));
    if (params.split) parts = config.schedule.num_parts;
  }
#endif
  *num_parts = parts;
  return {};
}

Status workspace_size(const DecodeArgs& args, std::size_t* counters_size,
                      std::size_t* partials_size) noexcept {
  FLASH_MLA_RETURN_IF_ERROR(check_pointer("workspace_size", "counters_size", counters_size));
  FLASH_MLA_RETURN_IF_ERROR(check_pointer("workspace_size", "partials_size", partials_size));
  DecodeParams params;
  FLASH_MLA_RETURN_IF_ERROR(check_decode("workspace_size", args, DecodeCheck::kSizes, &params));
  std::size_t counters = 0, partials = 0;
#ifdef FLASH_MLA_WITH_CUDA
  if (on_cuda(args)) {
    cuda::DecodeConfig config;
    FLASH_MLA_RETURN_IF_ERROR(cuda::decode_config(params, args.q.device.index, &config));
    counters = config.counters_size;
    partials = config.partials_size;
  }
#endif
  *counters_size = counters;
  *partials_size = partials;
  return {};
}

Status init_workspace(const Workspace& workspace, Device device, StreamHandle stream) noexcept {
  FLASH_MLA_RETURN_IF_ERROR(api::check_device("init_workspace", "workspace", device));
  FLASH_MLA_RETURN_IF_ERROR(check_workspace("init_workspace", workspace, 0, 0));
#ifdef FLASH_MLA_WITH_CUDA
  if (device.type == DeviceType::kCuda) {
    FLASH_MLA_RETURN_IF_ERROR(
        check_pointer("init_workspace", "workspace.counters", workspace.counters));
    return cuda::init_workspace(workspace, device.index, stream);
  }
#endif
  static_cast<void>(stream);
  return {};
}

Status plan_decode(const DecodeArgs& args, const DecodePlan& plan, StreamHandle stream) noexcept {
  DecodeParams params;
  PlanParams plan_params;
  FLASH_MLA_RETURN_IF_ERROR(check_decode("plan_decode", args, DecodeCheck::kPlan, &params));
  FLASH_MLA_RETURN_IF_ERROR(check_plan("plan_decode", plan, params, args.q.device,
                                       /*num_splits_optional=*/false, &plan_params));
#ifdef FLASH_MLA_WITH_CUDA
  if (on_cuda(args)) {
    const std::int32_t device = args.q.device.index;
    cuda::DecodeConfig config;
    FLASH_MLA_RETURN_IF_ERROR(cuda::decode_config(params, device, &config));
    std::int32_t parts = 1;
    if (params.split) parts = config.schedule.num_parts;
    FLASH_MLA_RETURN_IF_ERROR(check_plan_rows("plan_decode", plan_params.num_parts, parts));
    return cuda::plan_decode(params, config, plan_params, device, stream);
  }
#endif
  static_cast<void>(stream);
  FLASH_MLA_RETURN_IF_ERROR(check_plan_rows("plan_decode", plan_params.num_parts, 1));
  return cpu::plan_decode(params, plan_params);
}

Status decode(const DecodeArgs& args, const DecodePlan* plan, const Workspace& workspace,
              StreamHandle stream) noexcept {
  DecodeParams params;
  PlanParams plan_params;
  FLASH_MLA_RETURN_IF_ERROR(check_decode("decode", args, DecodeCheck::kAll, &params));
  if (plan != nullptr) {
    FLASH_MLA_RETURN_IF_ERROR(check_plan("decode", *plan, params, args.q.device,
                                         /*num_splits_optional=*/true, &plan_params));
  }
#ifdef FLASH_MLA_WITH_CUDA
  if (on_cuda(args)) {
    return decode_on_cuda(args, plan, plan_params.num_parts, workspace, params, stream);
  }
#endif
  static_cast<void>(workspace);
  static_cast<void>(stream);
  return has_rows(params) ? cpu::decode(params) : Status();
}

Status is_supported(const DecodeArgs& args) noexcept {
  DecodeParams params;
  FLASH_MLA_RETURN_IF_ERROR(check_decode("is_supported", args, DecodeCheck::kShapes, &params));
#ifdef FLASH_MLA_WITH_CUDA
  if (on_cuda(args)) {
    cuda::DecodeConfig config;
    FLASH_MLA_RETURN_IF_ERROR(cuda::decode_config(params, args.q.device.index, &config));
    return check_schedule_cost("is_supported", params, config);
  }
#endif
  return {};
}

Status describe_decode(const DecodeArgs& args, char* text, std::size_t size) noexcept {
  FLASH_MLA_RETURN_IF_ERROR(check_pointer("describe_decode", "text", text));
  if (size == 0) {
    return Status::error(StatusCode::kInvalidArgument,
                         "describe_decode: size = 0, wanted 1 or more");
  }
  DecodeParams params;
  FLASH_MLA_RETURN_IF_ERROR(check_decode("describe_decode", args, DecodeCheck::kShapes, &params));
#ifdef FLASH_MLA_WITH_CUDA
  if (on_cuda(args)) {
    cuda::DecodeConfig config;
    FLASH_MLA_RETURN_IF_ERROR(cuda::decode_config(params, args.q.device.index, &config));
    std::snprintf(text, size, "sm90 decode_dense %s pair=%d parts=%d team=%d",
                  dtype_name(params.dtype), config.cluster == 2 ? 1 : 0,
                  static_cast<int>(config.schedule.num_parts),
                  static_cast<int>(config.schedule.team));
    return {};
  }
#endif
  std::snprintf(text, size, "cpu decode_dense %s isa=%s threads=%d", dtype_name(params.dtype),
                cpu_isa(), cpu_num_threads());
  return {};
}

}  // namespace flash_mla
