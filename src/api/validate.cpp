// What each public call checks: one table row (Layout) per tensor, one function per call.
#include "api/validate.h"

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>

#include "api/checker.h"

namespace flash_mla::api {
namespace {

constexpr int kCudaPageSize = 64;
constexpr std::int64_t kTmaStrideLimit = 1LL << 40;  // bytes: a tensor map's strides lie below
constexpr int kWorkspaceAlignment = 256;             // bytes
constexpr int kLatentDim = kHeadDimV;                // of kv_c
constexpr int kRopeDim = kHeadDimQk - kHeadDimV;     // of k_pe

constexpr Layout kQ = {"q", 4, {"b", "s_q", "h_q", "d_qk"}};
constexpr Layout kKvCache = {"kv_cache", 4, {"num_pages", "page_size", "h_kv", "d_qk"}};
constexpr Layout kKvCacheNoHead = {"kv_cache", 3, {"num_pages", "page_size", "d_qk"}};
constexpr Layout kBlockTable = {"block_table", 2, {"b", "max_pages"}};
constexpr Layout kCacheSeqlens = {"cache_seqlens", 1, {"b"}};
constexpr Layout kOut = {"out", 4, {"b", "s_q", "h_q", "d_v"}};
constexpr Layout kLse = {"lse", 3, {"b", "h_q", "s_q"}};
constexpr Layout kMetadata = {"plan.metadata", 2, {"num_parts", "8"}};
constexpr Layout kNumSplits = {"plan.num_splits", 1, {"b + 1"}};
constexpr Layout kKvC = {"kv_c", 2, {"t", "512"}};
constexpr Layout kKPe = {"k_pe", 2, {"t", "64"}};
constexpr Layout kSlotMapping = {"slot_mapping", 1, {"t"}};

// What the GPU kernel asks of kv_cache and q beyond the CPU's wishes.
bool check_decode_cuda(Checker& check, const DecodeArgs& args, bool with_strides) {
  if (!check.fp32_is_cpu_only(kQ, args.q)) return false;
  if (args.kv_cache.shape[1] != kCudaPageSize) {
    return check.error(StatusCode::kUnsupported,
                       "kv_cache.shape[1] (page_size) = %lld, this build supports {%d} on a GPU",
                       static_cast<long long>(args.kv_cache.shape[1]), kCudaPageSize);
  }
  if (!with_strides) return true;
  if (!check.aligned_strides(kQ, args.q)) return false;
  if (!check.aligned_strides(kKvCache, args.kv_cache)) return false;
  for (int axis = 0; axis < 3; ++axis) {
    const std::int64_t bytes = args.kv_cache.stride[axis] * dtype_size(args.kv_cache.dtype);
    if (args.kv_cache.shape[axis] > 1 && (bytes == 0 || bytes >= kTmaStrideLimit)) {
      return check.invalid(
          "kv_cache.stride[%d] (%s) = %lld, wanted more than 0 and less than 2^40 bytes", axis,
          kKvCache.axes[axis], static_cast<long long>(args.kv_cache.stride[axis]));
    }
  }
  return true;
}

}  // namespace

Status check_device(const char* function, const char* name, Device device) noexcept {
  if (device.type != DeviceType::kCpu && device.type != DeviceType::kCuda) {
    return Status::error(StatusCode::kInvalidArgument,
                         "%s: %s.device type = %d, wanted 0 (cpu) or 1 (cuda)", function, name,
                         static_cast<int>(device.type));
  }
  if (device.index < 0 || (device.type == DeviceType::kCpu && device.index != 0)) {
    return Status::error(StatusCode::kInvalidArgument, "%s: %s.device index = %d, wanted %s",
                         function, name, device.index,
                         device.type == DeviceType::kCpu ? "0 for the CPU" : "0 or more");
  }
#ifndef FLASH_MLA_WITH_CUDA
  if (device.type == DeviceType::kCuda) {
    return Status::error(StatusCode::kUnavailable,
                         "%s: %s.device = cuda:%d, but this build has no CUDA backend; rebuild "
                         "with nvcc or pass CPU tensors",
                         function, name, device.index);
  }
#endif
  return {};
}

Status check_decode(const char* function, const DecodeArgs& args, DecodeCheck level,
                    DecodeParams* params) noexcept {
  Checker check(function);
  const TensorView &q = args.q, &kv = args.kv_cache;
  const Device device = q.device;
  const bool on_cuda = device.type == DeviceType::kCuda;

  if (!check.form(kQ, q)) return check.status();
  if (!check.device_exists("q", device)) return check.status();
  if (!check.float_dtype(kQ, q)) return check.status();
  if (!check.head_dim(kQ, q, 3, kHeadDimQk)) return check.status();
  if (!check.row_count(kQ, q.shape[0], q.shape[1], q.shape[2])) return check.status();

  if (!check.form(kKvCache, kv)) return check.status();
  if (!check.device(kKvCache, kv, device)) return check.status();
  if (!check.float_dtype(kKvCache, kv)) return check.status();
  if (!check.dtype(kKvCache, kv, q.dtype, " as q")) return check.status();
  if (!check.head_dim(kKvCache, kv, 3, kHeadDimQk)) return check.status();
  if (!check.page_size(kKvCache, kv)) return check.status();
  const std::int64_t h_q = q.shape[2], h_kv = kv.shape[2];
  if (h_q > 0 && (h_kv < 1 || h_q % h_kv != 0)) {
    check.invalid("q.shape[2] (h_q) = %lld, wanted a multiple of kv_cache.shape[2] (h_kv) = %lld",
                  static_cast<long long>(h_q), static_cast<long long>(h_kv));
    return check.status();
  }
  if (on_cuda && !check_decode_cuda(check, args, level >= DecodeCheck::kShapes)) {
    return check.status();
  }

  params->dtype = q.dtype;
  params->b = static_cast<std::int32_t>(q.shape[0]);
  params->s_q = static_cast<std::int32_t>(q.shape[1]);
  params->h_q = static_cast<std::int32_t>(h_q);
  params->h_kv = static_cast<std::int32_t>(h_kv);
  params->num_pages = static_cast<std::int32_t>(kv.shape[0]);
  params->page_size = static_cast<std::int32_t>(kv.shape[1]);
  params->causal = args.causal;
  params->split = !args.batch_invariant;
  if (level == DecodeCheck::kSizes) return {};

  const TensorView &table = args.block_table, &lengths = args.cache_seqlens;
  if (!check.form(kBlockTable, table)) return check.status();
  if (!check.device(kBlockTable, table, device)) return check.status();
  if (!check.dtype(kBlockTable, table, DType::kInt32)) return check.status();
  if (!check.extent(kBlockTable, table, 0, q.shape[0], " as q")) return check.status();
  if (table.shape[1] > kInt32Max / kv.shape[1]) {
    check.invalid(
        "block_table.shape[1] (max_pages) = %lld, wanted at most %lld: "
        "max_pages * page_size has to fit 32 bits",
        static_cast<long long>(table.shape[1]), static_cast<long long>(kInt32Max / kv.shape[1]));
    return check.status();
  }
  if (!check.form(kCacheSeqlens, lengths)) return check.status();
  if (!check.device(kCacheSeqlens, lengths, device)) return check.status();
  if (!check.dtype(kCacheSeqlens, lengths, DType::kInt32)) return check.status();
  if (!check.extent(kCacheSeqlens, lengths, 0, q.shape[0], " as q")) return check.status();
  params->max_pages = static_cast<std::int32_t>(table.shape[1]);
  params->cache_seqlens = static_cast<const std::int32_t*>(lengths.data);
  params->stride_q_b = q.stride[0];
  params->stride_q_s = q.stride[1];
  params->stride_q_h = q.stride[2];
  if (level == DecodeCheck::kPlan) {
    return check.data(kCacheSeqlens, lengths) ? Status() : check.status();
  }

  const TensorView &out = args.out, &lse = args.lse;
  if (!check.form(kOut, out)) return check.status();
  if (!check.device(kOut, out, device)) return check.status();
  if (!check.dtype(kOut, out, q.dtype, " as q")) return check.status();
  for (int axis = 0; axis < 3; ++axis) {
    if (!check.extent(kOut, out, axis, q.shape[axis], " as q")) return check.status();
  }
  if (!check.head_dim(kOut, out, 3, kHeadDimV)) return check.status();
  if (!check.no_overlap(kOut, out)) return check.status();
  if (on_cuda && !check.aligned_strides(kOut, out)) return check.status();
  if (lse.defined()) {
    if (!check.form(kLse, lse, false)) return check.status();
    if (!check.device(kLse, lse, device)) return check.status();
    if (!check.dtype(kLse, lse, DType::kFp32)) return check.status();
    if (!check.extent(kLse, lse, 0, q.shape[0], " as q")) return check.status();
    if (!check.extent(kLse, lse, 1, q.shape[2], " as q")) return check.status();
    if (!check.extent(kLse, lse, 2, q.shape[1], " as q")) return check.status();
    if (!check.no_overlap(kLse, lse)) return check.status();
  }
  const double scale =
      std::isnan(args.softmax_scale) ? 1.0 / std::sqrt(kHeadDimQk) : args.softmax_scale;
  if (std::abs(scale) > FLT_MAX) {
    check.invalid("softmax_scale = %g, wanted a finite 32-bit float", scale);
    return check.status();
  }
  if (!check.empty_lse(args.empty_lse, &params->empty_lse)) return check.status();
  if (level == DecodeCheck::kAll) {
    const int alignment = on_cuda ? kCudaAlignment : 0;
    if (!check.data(kQ, q, alignment)) return check.status();
    if (!check.data(kKvCache, kv, alignment)) return check.status();
    if (!check.data(kBlockTable, table)) return check.status();
    if (!check.data(kCacheSeqlens, lengths)) return check.status();
    if (!check.data(kOut, out, alignment)) return check.status();
    if (lse.defined() && !check.data(kLse, lse)) return check.status();
  }

  params->softmax_scale = static_cast<float>(scale);
  params->q = q.data;
  params->kv_cache = kv.data;
  params->stride_kv_page = kv.stride[0];
  params->stride_kv_row = kv.stride[1];
  params->stride_kv_head = kv.stride[2];
  params->block_table = static_cast<const std::int32_t*>(table.data);
  params->stride_block_table_b = table.stride[0];
  params->out = out.data;
  params->stride_out_b = out.stride[0];
  params->stride_out_s = out.stride[1];
  params->stride_out_h = out.stride[2];
  params->lse = lse.defined() ? static_cast<float*>(lse.data) : nullptr;
  params->stride_lse_b = lse.stride[0];
  params->stride_lse_h = lse.stride[1];
  params->stride_lse_s = lse.stride[2];
  return {};
}

Status check_plan(const char* function, const DecodePlan& plan, const DecodeParams& params,
                  Device device, bool num_splits_optional, PlanParams* plan_params) noexcept {
  Checker check(function);
  const TensorView &metadata = plan.metadata, &num_splits = plan.num_splits;
  if (!check.form(kMetadata, metadata)) return check.status();
  if (!check.device(kMetadata, metadata, device)) return check.status();
  if (!check.dtype(kMetadata, metadata, DType::kInt32)) return check.status();
  if (!check.extent(kMetadata, metadata, 1, kPlanRowInts, "")) return check.status();
  if (metadata.shape[0] < 1) {
    check.invalid("plan.metadata.shape[0] (num_parts) = 0, wanted 1 or more");
    return check.status();
  }
  if (metadata.shape[0] > 1 && metadata.stride[0] != kPlanRowInts) {
    check.invalid("plan.metadata.stride[0] (num_parts) = %lld, wanted %d (contiguous)",
                  static_cast<long long>(metadata.stride[0]), kPlanRowInts);
    return check.status();
  }
  if (!check.data(kMetadata, metadata)) return check.status();
  plan_params->metadata = static_cast<std::int32_t*>(metadata.data);
  plan_params->num_parts = static_cast<std::int32_t>(metadata.shape[0]);
  if (!num_splits.defined() && num_splits_optional) return {};
  if (!check.form(kNumSplits, num_splits)) return check.status();
  if (!check.device(kNumSplits, num_splits, device)) return check.status();
  if (!check.dtype(kNumSplits, num_splits, DType::kInt32)) return check.status();
  if (!check.extent(kNumSplits, num_splits, 0, std::int64_t{params.b} + 1, "")) {
    return check.status();
  }
  if (!check.data(kNumSplits, num_splits)) return check.status();
  plan_params->num_splits = static_cast<std::int32_t*>(num_splits.data);
  return {};
}

Status check_workspace(const char* function, const Workspace& workspace, std::size_t counters_size,
                       std::size_t partials_size) noexcept {
  Checker check(function);
  const struct {
    const char* name;
    const void* data;
    std::size_t size, wanted;
  } areas[] = {{"counters", workspace.counters, workspace.counters_size, counters_size},
               {"partials", workspace.partials, workspace.partials_size, partials_size}};
  for (const auto& area : areas) {
    if (area.size < area.wanted) {
      check.invalid("workspace.%s_size = %zu, wanted %zu or more (see workspace_size)", area.name,
                    area.size, area.wanted);
      return check.status();
    }
    if (area.data == nullptr && area.size > 0) {
      check.invalid("workspace.%s = null, wanted a pointer to %zu bytes", area.name, area.size);
      return check.status();
    }
    if (reinterpret_cast<std::uintptr_t>(area.data) % kWorkspaceAlignment != 0) {
      check.invalid("workspace.%s = %p, wanted a multiple of %d bytes", area.name, area.data,
                    kWorkspaceAlignment);
      return check.status();
    }
  }
  return {};
}

Status check_append_kv(const AppendKvArgs& args, AppendKvParams* params) noexcept {
  Checker check("append_kv");
  const TensorView &kv_c = args.kv_c, &k_pe = args.k_pe, &kv = args.kv_cache;
  const TensorView& slots = args.slot_mapping;
  const Device device = kv_c.device;

  if (!check.form(kKvC, kv_c)) return check.status();
  if (!check.device_exists("kv_c", device)) return check.status();
  if (!check.float_dtype(kKvC, kv_c)) return check.status();
  if (!check.fp32_is_cpu_only(kKvC, kv_c)) return check.status();
  if (!check.extent(kKvC, kv_c, 1, kLatentDim, "")) return check.status();

  if (!check.form(kKPe, k_pe)) return check.status();
  if (!check.device(kKPe, k_pe, device, " as kv_c")) return check.status();
  if (!check.dtype(kKPe, k_pe, kv_c.dtype, " as kv_c")) return check.status();
  if (!check.extent(kKPe, k_pe, 0, kv_c.shape[0], " as kv_c")) return check.status();
  if (!check.extent(kKPe, k_pe, 1, kRopeDim, "")) return check.status();

  const Layout& kv_layout = kv.rank == 3 ? kKvCacheNoHead : kKvCache;
  if (!check.form(kv_layout, kv)) return check.status();
  if (!check.device(kv_layout, kv, device, " as kv_c")) return check.status();
  if (!check.float_dtype(kv_layout, kv)) return check.status();
  if (!check.dtype(kv_layout, kv, kv_c.dtype, " as kv_c")) return check.status();
  if (!check.page_size(kv_layout, kv)) return check.status();
  if (kv.rank == 4 && !check.extent(kv_layout, kv, 2, 1, "")) return check.status();
  if (!check.head_dim(kv_layout, kv, kv.rank - 1, kHeadDimQk)) return check.status();
  if (!check.no_overlap(kv_layout, kv)) return check.status();

  if (!check.form(kSlotMapping, slots)) return check.status();
  if (!check.device(kSlotMapping, slots, device, " as kv_c")) return check.status();
  if (!check.dtype(kSlotMapping, slots, DType::kInt64)) return check.status();
  if (!check.extent(kSlotMapping, slots, 0, kv_c.shape[0], " as kv_c")) return check.status();

  if (!check.data(kKvC, kv_c)) return check.status();
  if (!check.data(kKPe, k_pe)) return check.status();
  if (!check.data(kv_layout, kv)) return check.status();
  if (!check.data(kSlotMapping, slots)) return check.status();

  params->dtype = kv_c.dtype;
  params->t = kv_c.shape[0];
  params->num_pages = kv.shape[0];
  params->page_size = static_cast<std::int32_t>(kv.shape[1]);
  params->kv_c = kv_c.data;
  params->stride_kv_c_t = kv_c.stride[0];
  params->k_pe = k_pe.data;
  params->stride_k_pe_t = k_pe.stride[0];
  params->kv_cache = kv.data;
  params->stride_kv_page = kv.stride[0];
  params->stride_kv_row = kv.stride[1];
  params->slot_mapping = static_cast<const std::int64_t*>(slots.data);
  return {};
}

Status check_merge_states(const MergeStatesArgs& args, MergeStatesParams* params) noexcept {
  static_assert(kMaxMergeParts == kMergePartsLimit);
  constexpr int kMaxDim = 1024;
  constexpr int kDimStep = 8;
  Checker check("merge_states");
  const TensorView &out = args.out, &lse = args.lse;
  const Device device = out.device;

  if (args.num_parts < 1 || args.num_parts > kMaxMergeParts) {
    check.invalid("num_parts = %d, wanted 1 .. %d", args.num_parts, kMaxMergeParts);
    return check.status();
  }
  if (args.outs == nullptr || args.lses == nullptr) {
    check.invalid("%s = null, wanted num_parts = %d tensors",
                  args.outs == nullptr ? "outs" : "lses", args.num_parts);
    return check.status();
  }
  if (!check.form(kOut, out)) return check.status();
  if (!check.device_exists("out", device)) return check.status();
  if (!check.float_dtype(kOut, out)) return check.status();
  if (!check.row_count(kOut, out.shape[0], out.shape[1], out.shape[2])) return check.status();
  const std::int64_t d = out.shape[3];
  if (d < kDimStep || d > kMaxDim || d % kDimStep != 0) {
    check.invalid("out.shape[3] (d_v) = %lld, wanted a multiple of %d up to %d",
                  static_cast<long long>(d), kDimStep, kMaxDim);
    return check.status();
  }
  if (!check.no_overlap(kOut, out)) return check.status();
  if (!check.data(kOut, out)) return check.status();

  // The shape of every lse: [b, h_q, s_q] of out.
  const auto check_lse = [&](const Layout& layout, const TensorView& view) {
    return check.form(layout, view, false) && check.device(layout, view, device, " as out") &&
           check.dtype(layout, view, DType::kFp32) &&
           check.extent(layout, view, 0, out.shape[0], " as out") &&
           check.extent(layout, view, 1, out.shape[2], " as out") &&
           check.extent(layout, view, 2, out.shape[1], " as out") && check.data(layout, view);
  };
  if (!check_lse(kLse, lse)) return check.status();
  if (!check.no_overlap(kLse, lse)) return check.status();

  for (int part = 0; part < args.num_parts; ++part) {
    char name[24];
    Layout layout = kOut;
    layout.tensor = name;
    const TensorView& part_out = args.outs[part];
    std::snprintf(name, sizeof(name), "outs[%d]", part);
    if (!check.form(layout, part_out)) return check.status();
    if (!check.device(layout, part_out, device, " as out")) return check.status();
    if (!check.float_dtype(layout, part_out)) return check.status();
    if (part > 0) {
      if (!check.dtype(layout, part_out, args.outs[0].dtype, " as outs[0]")) return check.status();
    }
    for (int axis = 0; axis < 4; ++axis) {
      if (!check.extent(layout, part_out, axis, out.shape[axis], " as out")) return check.status();
    }
    if (!check.data(layout, part_out)) return check.status();

    const TensorView& part_lse = args.lses[part];
    layout = kLse;
    layout.tensor = name;
    std::snprintf(name, sizeof(name), "lses[%d]", part);
    if (!check_lse(layout, part_lse)) return check.status();

    params->parts[part] = {part_out.data,      static_cast<const float*>(part_lse.data),
                           part_out.stride[0], part_out.stride[1],
                           part_out.stride[2], part_lse.stride[0],
                           part_lse.stride[1], part_lse.stride[2]};
  }
  if (out.dtype != args.outs[0].dtype && out.dtype != DType::kFp32) {
    check.error(StatusCode::kInvalidType, "out.dtype = %s, wanted %s as outs[0], or fp32",
                dtype_name(out.dtype), dtype_name(args.outs[0].dtype));
    return check.status();
  }
  if (!check.empty_lse(args.empty_lse, &params->empty_lse)) return check.status();

  params->dtype = args.outs[0].dtype;
  params->out_dtype = out.dtype;
  params->num_parts = args.num_parts;
  params->b = static_cast<std::int32_t>(out.shape[0]);
  params->s_q = static_cast<std::int32_t>(out.shape[1]);
  params->h_q = static_cast<std::int32_t>(out.shape[2]);
  params->d = static_cast<std::int32_t>(d);
  params->out = out.data;
  params->stride_out_b = out.stride[0];
  params->stride_out_s = out.stride[1];
  params->stride_out_h = out.stride[2];
  params->lse = static_cast<float*>(lse.data);
  params->stride_lse_b = lse.stride[0];
  params->stride_lse_h = lse.stride[1];
  params->stride_lse_s = lse.stride[2];
  return {};
}

}  // namespace flash_mla::api
