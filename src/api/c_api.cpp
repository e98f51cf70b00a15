// The C ABI: thin forwarders to the C++ API.
#include "flash_mla/c_api.h"

#include <cmath>
#include <cstring>

#include "flash_mla/flash_mla.h"

namespace flash_mla {
namespace {

static_assert(FLASH_MLA_MAX_RANK == kMaxRank);
static_assert(FLASH_MLA_MAX_MESSAGE == Status::kMaxMessage);

flash_mla_status to_c(const Status& status) {
  flash_mla_status result;
  result.code = static_cast<std::int32_t>(status.code());
  std::memcpy(result.message, status.message(), sizeof(result.message));
  return result;
}

TensorView to_cpp(const flash_mla_tensor& tensor) {
  TensorView view;
  view.data = tensor.data;
  view.dtype = static_cast<DType>(tensor.dtype);
  view.device = {static_cast<DeviceType>(tensor.device_type), tensor.device_index};
  view.rank = tensor.rank;
  std::memcpy(view.shape, tensor.shape, sizeof(view.shape));
  std::memcpy(view.stride, tensor.stride, sizeof(view.stride));
  return view;
}

// A struct is there and at least as large as this version of it. A larger one comes from a newer
// header; what it has besides is not read.
template <typename Struct>
Status check_struct(const char* function, const char* name, const Struct* value) {
  if (value == nullptr) {
    return Status::error(StatusCode::kInvalidArgument, "%s: %s = null, wanted a pointer", function,
                         name);
  }
  if (value->struct_size < sizeof(Struct)) {
    return Status::error(StatusCode::kInvalidArgument,
                         "%s: %s.struct_size = %zu, wanted %zu or more", function, name,
                         value->struct_size, sizeof(Struct));
  }
  return {};
}

Status read_flag(const char* function, const char* name, std::int32_t value, bool* flag) {
  if (value != 0 && value != 1) {
    return Status::error(StatusCode::kInvalidArgument, "%s: %s = %d, wanted 0 or 1", function, name,
                         value);
  }
  *flag = value != 0;
  return {};
}

Status read_args(const char* function, const flash_mla_decode_args* args, DecodeArgs* result) {
  FLASH_MLA_RETURN_IF_ERROR(check_struct(function, "args", args));
  bool has_scale = false;
  FLASH_MLA_RETURN_IF_ERROR(
      read_flag(function, "has_softmax_scale", args->has_softmax_scale, &has_scale));
  FLASH_MLA_RETURN_IF_ERROR(read_flag(function, "causal", args->causal, &result->causal));
  FLASH_MLA_RETURN_IF_ERROR(
      read_flag(function, "batch_invariant", args->batch_invariant, &result->batch_invariant));
  FLASH_MLA_RETURN_IF_ERROR(read_flag(function, "validate", args->validate, &result->validate));
  if (has_scale) {
    if (std::isnan(args->softmax_scale)) {
      return Status::error(StatusCode::kInvalidArgument,
                           "%s: softmax_scale = nan, wanted a finite 32-bit float", function);
    }
    result->softmax_scale = args->softmax_scale;
  }
  result->q = to_cpp(args->q);
  result->kv_cache = to_cpp(args->kv_cache);
  result->block_table = to_cpp(args->block_table);
  result->cache_seqlens = to_cpp(args->cache_seqlens);
  result->out = to_cpp(args->out);
  result->lse = to_cpp(args->lse);
  result->empty_lse = static_cast<EmptyLse>(args->empty_lse);
  return {};
}

Status read_plan(const char* function, const flash_mla_plan* plan, DecodePlan* result) {
  FLASH_MLA_RETURN_IF_ERROR(check_struct(function, "plan", plan));
  result->metadata = to_cpp(plan->metadata);
  result->num_splits = to_cpp(plan->num_splits);
  return {};
}

Status read_workspace(const char* function, const flash_mla_workspace* workspace,
                      Workspace* result) {
  FLASH_MLA_RETURN_IF_ERROR(check_struct(function, "workspace", workspace));
  *result = {workspace->counters, workspace->counters_size, workspace->partials,
             workspace->partials_size};
  return {};
}

Status c_plan_size(const flash_mla_decode_args* args, std::int32_t* num_parts) {
  DecodeArgs decode_args;
  FLASH_MLA_RETURN_IF_ERROR(read_args("plan_size", args, &decode_args));
  return plan_size(decode_args, num_parts);
}

Status c_workspace_size(const flash_mla_decode_args* args, std::size_t* counters_size,
                        std::size_t* partials_size) {
  DecodeArgs decode_args;
  FLASH_MLA_RETURN_IF_ERROR(read_args("workspace_size", args, &decode_args));
  return workspace_size(decode_args, counters_size, partials_size);
}

Status c_init_workspace(const flash_mla_workspace* workspace, Device device, void* stream) {
  Workspace areas;
  FLASH_MLA_RETURN_IF_ERROR(read_workspace("init_workspace", workspace, &areas));
  return init_workspace(areas, device, stream);
}

Status c_plan_decode(const flash_mla_decode_args* args, const flash_mla_plan* plan, void* stream) {
  DecodeArgs decode_args;
  DecodePlan decode_plan;
  FLASH_MLA_RETURN_IF_ERROR(read_args("plan_decode", args, &decode_args));
  FLASH_MLA_RETURN_IF_ERROR(read_plan("plan_decode", plan, &decode_plan));
  return plan_decode(decode_args, decode_plan, stream);
}

Status c_decode(const flash_mla_decode_args* args, const flash_mla_plan* plan,
                const flash_mla_workspace* workspace, void* stream) {
  DecodeArgs decode_args;
  DecodePlan decode_plan;
  Workspace areas;
  FLASH_MLA_RETURN_IF_ERROR(read_args("decode", args, &decode_args));
  if (plan != nullptr) FLASH_MLA_RETURN_IF_ERROR(read_plan("decode", plan, &decode_plan));
  if (workspace != nullptr) {
    FLASH_MLA_RETURN_IF_ERROR(read_workspace("decode", workspace, &areas));
  }
  return decode(decode_args, plan == nullptr ? nullptr : &decode_plan, areas, stream);
}

Status c_is_supported(const flash_mla_decode_args* args) {
  DecodeArgs decode_args;
  FLASH_MLA_RETURN_IF_ERROR(read_args("is_supported", args, &decode_args));
  return is_supported(decode_args);
}

Status c_describe_decode(const flash_mla_decode_args* args, char* text, std::size_t size) {
  DecodeArgs decode_args;
  FLASH_MLA_RETURN_IF_ERROR(read_args("describe_decode", args, &decode_args));
  return describe_decode(decode_args, text, size);
}

Status c_append_kv(const flash_mla_append_kv_args* args, void* stream) {
  FLASH_MLA_RETURN_IF_ERROR(check_struct("append_kv", "args", args));
  return append_kv(
      {to_cpp(args->kv_c), to_cpp(args->k_pe), to_cpp(args->kv_cache), to_cpp(args->slot_mapping)},
      stream);
}

Status c_merge_states(const flash_mla_merge_states_args* args, void* stream) {
  FLASH_MLA_RETURN_IF_ERROR(check_struct("merge_states", "args", args));
  TensorView outs[kMaxMergeParts], lses[kMaxMergeParts];
  MergeStatesArgs merge_args;
  merge_args.outs = args->outs == nullptr ? nullptr : outs;
  merge_args.lses = args->lses == nullptr ? nullptr : lses;
  merge_args.num_parts = args->num_parts;
  merge_args.out = to_cpp(args->out);
  merge_args.lse = to_cpp(args->lse);
  merge_args.empty_lse = static_cast<EmptyLse>(args->empty_lse);
  for (int part = 0; part < args->num_parts && part < kMaxMergeParts; ++part) {
    if (args->outs != nullptr) outs[part] = to_cpp(args->outs[part]);
    if (args->lses != nullptr) lses[part] = to_cpp(args->lses[part]);
  }
  return merge_states(merge_args, stream);
}

}  // namespace
}  // namespace flash_mla

using flash_mla::to_c;

extern "C" {

const char* flash_mla_version(void) { return flash_mla::version(); }

int32_t flash_mla_built_with_cuda(void) { return flash_mla::built_with_cuda() ? 1 : 0; }

int32_t flash_mla_cuda_device_count(void) { return flash_mla::cuda_device_count(); }

flash_mla_status flash_mla_plan_size(const flash_mla_decode_args* args, int32_t* num_parts) {
  return to_c(flash_mla::c_plan_size(args, num_parts));
}

flash_mla_status flash_mla_workspace_size(const flash_mla_decode_args* args, size_t* counters_size,
                                          size_t* partials_size) {
  return to_c(flash_mla::c_workspace_size(args, counters_size, partials_size));
}

flash_mla_status flash_mla_init_workspace(const flash_mla_workspace* workspace, int32_t device_type,
                                          int32_t device_index, void* stream) {
  const flash_mla::Device device = {static_cast<flash_mla::DeviceType>(device_type), device_index};
  return to_c(flash_mla::c_init_workspace(workspace, device, stream));
}

flash_mla_status flash_mla_plan_decode(const flash_mla_decode_args* args,
                                       const flash_mla_plan* plan, void* stream) {
  return to_c(flash_mla::c_plan_decode(args, plan, stream));
}

flash_mla_status flash_mla_decode(const flash_mla_decode_args* args, const flash_mla_plan* plan,
                                  const flash_mla_workspace* workspace, void* stream) {
  return to_c(flash_mla::c_decode(args, plan, workspace, stream));
}

flash_mla_status flash_mla_is_supported(const flash_mla_decode_args* args) {
  return to_c(flash_mla::c_is_supported(args));
}

flash_mla_status flash_mla_describe_decode(const flash_mla_decode_args* args, char* text,
                                           size_t size) {
  return to_c(flash_mla::c_describe_decode(args, text, size));
}

flash_mla_status flash_mla_append_kv(const flash_mla_append_kv_args* args, void* stream) {
  return to_c(flash_mla::c_append_kv(args, stream));
}

flash_mla_status flash_mla_merge_states(const flash_mla_merge_states_args* args, void* stream) {
  return to_c(flash_mla::c_merge_states(args, stream));
}

}  // extern "C"
