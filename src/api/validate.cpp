// The checks of user input. One table row (Layout) per tensor, one function per kind of check, one
// function per public call.
#include "api/validate.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <limits>

namespace flash_mla::api {
namespace {

constexpr std::int64_t kInt32Max = std::numeric_limits<std::int32_t>::max();
constexpr int kCudaPageSize = 64;
constexpr int kMaxPageSize = 256;
constexpr int kCudaAlignment = 16;                   // bytes: TMA and 16-byte stores
constexpr std::int64_t kTmaStrideLimit = 1LL << 40;  // bytes: a tensor map's strides lie below
constexpr int kWorkspaceAlignment = 256;             // bytes
constexpr int kLatentDim = kHeadDimV;                // of kv_c
constexpr int kRopeDim = kHeadDimQk - kHeadDimV;     // of k_pe

constexpr const char* kFloatDTypes = "bf16, fp16 or fp32";

// Name, rank and axes of a tensor, as messages call them.
struct Layout {
  const char* tensor;
  int rank;
  const char* axes[4];
};

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

bool is_float(DType dtype) {
  return dtype == DType::kBf16 || dtype == DType::kFp16 || dtype == DType::kFp32;
}

// "[b, s_q, h_q, d_qk]"
struct AxesText {
  char text[64];
  explicit AxesText(const Layout& layout) {
    int at = std::snprintf(text, sizeof(text), "[");
    for (int axis = 0; axis < layout.rank; ++axis) {
      at += std::snprintf(text + at, sizeof(text) - at, "%s%s", axis > 0 ? ", " : "",
                          layout.axes[axis]);
    }
    std::snprintf(text + at, sizeof(text) - at, "]");
  }
};

// "cpu", "cuda:0"
struct DeviceText {
  char text[32];
  explicit DeviceText(Device device) {
    if (device.type == DeviceType::kCpu) {
      std::snprintf(text, sizeof(text), "cpu");
    } else {
      std::snprintf(text, sizeof(text), "cuda:%d", device.index);
    }
  }
};

bool has_elements(const TensorView& view) {
  return std::all_of(view.shape, view.shape + view.rank,
                     [](std::int64_t extent) { return extent > 0; });
}

// Messages of one public function. Every method returns kOk or names function, argument, got and
// wanted.
class Checker {
 public:
  explicit constexpr Checker(const char* function) : function_(function) {}

  [[gnu::format(printf, 2, 3)]] Status invalid(const char* format, ...) const {
    va_list arguments;
    va_start(arguments, format);
    const Status status = make(StatusCode::kInvalidArgument, format, arguments);
    va_end(arguments);
    return status;
  }

  [[gnu::format(printf, 3, 4)]] Status error(StatusCode code, const char* format, ...) const {
    va_list arguments;
    va_start(arguments, format);
    const Status status = make(code, format, arguments);
    va_end(arguments);
    return status;
  }

  // A defined tensor of the layout's rank whose extents fit 32 bits and whose strides are not
  // negative and stay inside 63 bits. `last_contiguous`: the last axis has stride 1.
  Status form(const Layout& layout, const TensorView& view, bool last_contiguous = true) const {
    if (!view.defined()) {
      return invalid("%s is not given, wanted %s", layout.tensor, AxesText(layout).text);
    }
    if (dtype_size(view.dtype) == 0) {
      return error(StatusCode::kInvalidType, "%s.dtype = %d, which is no DType", layout.tensor,
                   static_cast<int>(view.dtype));
    }
    if (view.rank != layout.rank) {
      return invalid("%s.rank = %d, wanted %d: %s", layout.tensor, view.rank, layout.rank,
                     AxesText(layout).text);
    }
    std::int64_t span =
        dtype_size(view.dtype);  // bytes from the first element to the end of the last
    for (int axis = 0; axis < view.rank; ++axis) {
      const std::int64_t extent = view.shape[axis];
      const std::int64_t stride = view.stride[axis];
      if (extent < 0 || extent > kInt32Max) {
        return invalid("%s.shape[%d] (%s) = %lld, wanted 0 .. 2147483647", layout.tensor, axis,
                       layout.axes[axis], static_cast<long long>(extent));
      }
      if (extent <= 1) continue;
      if (stride < 0) {
        return invalid("%s.stride[%d] (%s) = %lld, wanted 0 or more", layout.tensor, axis,
                       layout.axes[axis], static_cast<long long>(stride));
      }
      std::int64_t bytes;
      if (__builtin_mul_overflow(stride, (extent - 1) * dtype_size(view.dtype), &bytes) ||
          __builtin_add_overflow(span, bytes, &span)) {
        return invalid("%s.stride[%d] (%s) = %lld: the tensor reaches over 2^63 bytes",
                       layout.tensor, axis, layout.axes[axis], static_cast<long long>(stride));
      }
    }
    const int last = view.rank - 1;
    if (last_contiguous && view.shape[last] > 1 && view.stride[last] != 1) {
      return invalid("%s.stride[%d] (%s) = %lld, wanted 1 (contiguous)", layout.tensor, last,
                     layout.axes[last], static_cast<long long>(view.stride[last]));
    }
    return {};
  }

  Status extent(const Layout& layout, const TensorView& view, int axis, std::int64_t wanted,
                const char* source) const {
    if (view.shape[axis] == wanted) return {};
    return invalid("%s.shape[%d] (%s) = %lld, wanted %lld%s", layout.tensor, axis,
                   layout.axes[axis], static_cast<long long>(view.shape[axis]),
                   static_cast<long long>(wanted), source);
  }

  Status head_dim(const Layout& layout, const TensorView& view, int axis, int supported) const {
    if (view.shape[axis] == supported) return {};
    return invalid("%s.shape[%d] (%s) = %lld, this build supports {%d}", layout.tensor, axis,
                   layout.axes[axis], static_cast<long long>(view.shape[axis]), supported);
  }

  Status dtype(const Layout& layout, const TensorView& view, DType wanted,
               const char* source = "") const {
    if (view.dtype == wanted) return {};
    return error(StatusCode::kInvalidType, "%s.dtype = %s, wanted %s%s", layout.tensor,
                 dtype_name(view.dtype), dtype_name(wanted), source);
  }

  // bf16 and fp16; fp32 on the CPU.
  Status float_dtype(const Layout& layout, const TensorView& view) const {
    if (view.dtype == DType::kFp8E4M3) {
      return error(StatusCode::kUnsupported,
                   "%s.dtype = fp8_e4m3, not supported by this build; wanted %s", layout.tensor,
                   kFloatDTypes);
    }
    if (!is_float(view.dtype)) {
      return error(StatusCode::kInvalidType, "%s.dtype = %s, wanted %s", layout.tensor,
                   dtype_name(view.dtype), kFloatDTypes);
    }
    return {};
  }

  Status device(const Layout& layout, const TensorView& view, Device wanted,
                const char* source = " as q") const {
    if (view.device == wanted) return {};
    FLASH_MLA_RETURN_IF_ERROR(check_device(function_, layout.tensor, view.device));
    return invalid("%s.device = %s, wanted %s%s", layout.tensor, DeviceText(view.device).text,
                   DeviceText(wanted).text, source);
  }

  // A pointer, aligned to `alignment` bytes, where the tensor has an element.
  Status data(const Layout& layout, const TensorView& view, int alignment = 0) const {
    if (!has_elements(view)) return {};
    if (view.data == nullptr) {
      return invalid("%s.data = null, wanted a pointer", layout.tensor);
    }
    const int wanted = std::max(alignment, dtype_size(view.dtype));
    if (reinterpret_cast<std::uintptr_t>(view.data) % wanted != 0) {
      return invalid("%s.data = %p, wanted a multiple of %d bytes", layout.tensor, view.data,
                     wanted);
    }
    return {};
  }

  // Strides of all axes but the last are multiples of 16 bytes.
  Status aligned_strides(const Layout& layout, const TensorView& view) const {
    const int elements = kCudaAlignment / dtype_size(view.dtype);
    for (int axis = 0; axis + 1 < view.rank; ++axis) {
      if (view.shape[axis] > 1 && view.stride[axis] % elements != 0) {
        return invalid("%s.stride[%d] (%s) = %lld, wanted a multiple of %d elements (%d bytes)",
                       layout.tensor, axis, layout.axes[axis],
                       static_cast<long long>(view.stride[axis]), elements, kCudaAlignment);
      }
    }
    return {};
  }

  // No two elements at one address. Axes sorted by stride must each step over all the finer ones:
  // sufficient, and also necessary but for layouts that nobody uses.
  Status no_overlap(const Layout& layout, const TensorView& view) const {
    if (!has_elements(view)) return {};
    int order[kMaxRank];  // axes by stride, finest first
    for (int axis = 0; axis < view.rank; ++axis) {
      int place = axis;
      for (; place > 0 && view.stride[order[place - 1]] > view.stride[axis]; --place) {
        order[place] = order[place - 1];
      }
      order[place] = axis;
    }
    std::int64_t reach = 0;
    for (int i = 0; i < view.rank; ++i) {
      const int axis = order[i];
      if (view.shape[axis] <= 1) continue;
      if (view.stride[axis] <= reach) {
        return invalid("%s.stride[%d] (%s) = %lld, wanted more than %lld: elements overlap",
                       layout.tensor, axis, layout.axes[axis],
                       static_cast<long long>(view.stride[axis]), static_cast<long long>(reach));
      }
      reach += view.stride[axis] * (view.shape[axis] - 1);
    }
    return {};
  }

  // rows = b * s_q * h_q are counted in 32 bits by the backends.
  Status row_count(const Layout& layout, std::int64_t b, std::int64_t s_q, std::int64_t h_q) const {
    if (s_q * h_q <= kInt32Max && (s_q * h_q == 0 || b <= kInt32Max / (s_q * h_q))) return {};
    return invalid("%s has %lld * %lld * %lld rows (b * s_q * h_q), wanted at most 2147483647",
                   layout.tensor, static_cast<long long>(b), static_cast<long long>(s_q),
                   static_cast<long long>(h_q));
  }

  Status page_size(const Layout& layout, const TensorView& view) const {
    if (view.shape[1] >= 1 && view.shape[1] <= kMaxPageSize) return {};
    return invalid("%s.shape[1] (page_size) = %lld, wanted 1 .. %d", layout.tensor,
                   static_cast<long long>(view.shape[1]), kMaxPageSize);
  }

  Status empty_lse(EmptyLse value, float* infinity) const {
    if (value != EmptyLse::kPositiveInfinity && value != EmptyLse::kNegativeInfinity) {
      return invalid("empty_lse = %d, wanted 0 (+inf) or 1 (-inf)", static_cast<int>(value));
    }
    const float inf = std::numeric_limits<float>::infinity();
    *infinity = value == EmptyLse::kPositiveInfinity ? inf : -inf;
    return {};
  }

  Status fp32_is_cpu_only(const Layout& layout, const TensorView& view) const {
    if (view.device.type == DeviceType::kCpu || view.dtype != DType::kFp32) return {};
    return error(StatusCode::kUnsupported,
                 "%s.dtype = fp32, wanted bf16 or fp16 on a GPU; fp32 runs on the CPU",
                 layout.tensor);
  }

 private:
  [[gnu::format(printf, 3, 0)]] Status make(StatusCode code, const char* format,
                                            va_list arguments) const {
    char text[Status::kMaxMessage];
    std::vsnprintf(text, sizeof(text), format, arguments);
    return Status::error(code, "%s: %s", function_, text);
  }

  const char* function_;
};

// What the GPU kernel asks of kv_cache and q beyond the CPU's wishes.
Status check_decode_cuda(const Checker& check, const DecodeArgs& args, bool with_strides) {
  FLASH_MLA_RETURN_IF_ERROR(check.fp32_is_cpu_only(kQ, args.q));
  if (args.kv_cache.shape[1] != kCudaPageSize) {
    return check.error(StatusCode::kUnsupported,
                       "kv_cache.shape[1] (page_size) = %lld, this build supports {%d} on a GPU",
                       static_cast<long long>(args.kv_cache.shape[1]), kCudaPageSize);
  }
  if (!with_strides) return {};
  FLASH_MLA_RETURN_IF_ERROR(check.aligned_strides(kQ, args.q));
  FLASH_MLA_RETURN_IF_ERROR(check.aligned_strides(kKvCache, args.kv_cache));
  for (int axis = 0; axis < 3; ++axis) {
    const std::int64_t bytes = args.kv_cache.stride[axis] * dtype_size(args.kv_cache.dtype);
    if (args.kv_cache.shape[axis] > 1 && (bytes == 0 || bytes >= kTmaStrideLimit)) {
      return check.invalid(
          "kv_cache.stride[%d] (%s) = %lld, wanted more than 0 and less than 2^40 bytes", axis,
          kKvCache.axes[axis], static_cast<long long>(args.kv_cache.stride[axis]));
    }
  }
  return {};
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
  const Checker check(function);
  const TensorView &q = args.q, &kv = args.kv_cache;
  const Device device = q.device;
  const bool on_cuda = device.type == DeviceType::kCuda;

  FLASH_MLA_RETURN_IF_ERROR(check.form(kQ, q));
  FLASH_MLA_RETURN_IF_ERROR(check_device(function, "q", device));
  FLASH_MLA_RETURN_IF_ERROR(check.float_dtype(kQ, q));
  FLASH_MLA_RETURN_IF_ERROR(check.head_dim(kQ, q, 3, kHeadDimQk));
  FLASH_MLA_RETURN_IF_ERROR(check.row_count(kQ, q.shape[0], q.shape[1], q.shape[2]));

  FLASH_MLA_RETURN_IF_ERROR(check.form(kKvCache, kv));
  FLASH_MLA_RETURN_IF_ERROR(check.device(kKvCache, kv, device));
  FLASH_MLA_RETURN_IF_ERROR(check.float_dtype(kKvCache, kv));
  FLASH_MLA_RETURN_IF_ERROR(check.dtype(kKvCache, kv, q.dtype, " as q"));
  FLASH_MLA_RETURN_IF_ERROR(check.head_dim(kKvCache, kv, 3, kHeadDimQk));
  FLASH_MLA_RETURN_IF_ERROR(check.page_size(kKvCache, kv));
  const std::int64_t h_q = q.shape[2], h_kv = kv.shape[2];
  if (h_q > 0 && (h_kv < 1 || h_q % h_kv != 0)) {
    return check.invalid(
        "q.shape[2] (h_q) = %lld, wanted a multiple of kv_cache.shape[2] (h_kv) = %lld",
        static_cast<long long>(h_q), static_cast<long long>(h_kv));
  }
  if (on_cuda) {
    FLASH_MLA_RETURN_IF_ERROR(check_decode_cuda(check, args, level >= DecodeCheck::kShapes));
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
  FLASH_MLA_RETURN_IF_ERROR(check.form(kBlockTable, table));
  FLASH_MLA_RETURN_IF_ERROR(check.device(kBlockTable, table, device));
  FLASH_MLA_RETURN_IF_ERROR(check.dtype(kBlockTable, table, DType::kInt32));
  FLASH_MLA_RETURN_IF_ERROR(check.extent(kBlockTable, table, 0, q.shape[0], " as q"));
  if (table.shape[1] > kInt32Max / kv.shape[1]) {
    return check.invalid(
        "block_table.shape[1] (max_pages) = %lld, wanted at most %lld: "
        "max_pages * page_size has to fit 32 bits",
        static_cast<long long>(table.shape[1]), static_cast<long long>(kInt32Max / kv.shape[1]));
  }
  FLASH_MLA_RETURN_IF_ERROR(check.form(kCacheSeqlens, lengths));
  FLASH_MLA_RETURN_IF_ERROR(check.device(kCacheSeqlens, lengths, device));
  FLASH_MLA_RETURN_IF_ERROR(check.dtype(kCacheSeqlens, lengths, DType::kInt32));
  FLASH_MLA_RETURN_IF_ERROR(check.extent(kCacheSeqlens, lengths, 0, q.shape[0], " as q"));
  params->max_pages = static_cast<std::int32_t>(table.shape[1]);
  params->cache_seqlens = static_cast<const std::int32_t*>(lengths.data);
  if (level == DecodeCheck::kPlan) return check.data(kCacheSeqlens, lengths);

  const TensorView &out = args.out, &lse = args.lse;
  FLASH_MLA_RETURN_IF_ERROR(check.form(kOut, out));
  FLASH_MLA_RETURN_IF_ERROR(check.device(kOut, out, device));
  FLASH_MLA_RETURN_IF_ERROR(check.dtype(kOut, out, q.dtype, " as q"));
  for (int axis = 0; axis < 3; ++axis) {
    FLASH_MLA_RETURN_IF_ERROR(check.extent(kOut, out, axis, q.shape[axis], " as q"));
  }
  FLASH_MLA_RETURN_IF_ERROR(check.head_dim(kOut, out, 3, kHeadDimV));
  FLASH_MLA_RETURN_IF_ERROR(check.no_overlap(kOut, out));
  if (on_cuda) FLASH_MLA_RETURN_IF_ERROR(check.aligned_strides(kOut, out));
  if (lse.defined()) {
    FLASH_MLA_RETURN_IF_ERROR(check.form(kLse, lse, false));
    FLASH_MLA_RETURN_IF_ERROR(check.device(kLse, lse, device));
    FLASH_MLA_RETURN_IF_ERROR(check.dtype(kLse, lse, DType::kFp32));
    FLASH_MLA_RETURN_IF_ERROR(check.extent(kLse, lse, 0, q.shape[0], " as q"));
    FLASH_MLA_RETURN_IF_ERROR(check.extent(kLse, lse, 1, q.shape[2], " as q"));
    FLASH_MLA_RETURN_IF_ERROR(check.extent(kLse, lse, 2, q.shape[1], " as q"));
    FLASH_MLA_RETURN_IF_ERROR(check.no_overlap(kLse, lse));
  }
  const double scale =
      std::isnan(args.softmax_scale) ? 1.0 / std::sqrt(kHeadDimQk) : args.softmax_scale;
  if (std::abs(scale) > FLT_MAX) {
    return check.invalid("softmax_scale = %g, wanted a finite 32-bit float", scale);
  }
  FLASH_MLA_RETURN_IF_ERROR(check.empty_lse(args.empty_lse, &params->empty_lse));
  if (level == DecodeCheck::kAll) {
    const int alignment = on_cuda ? kCudaAlignment : 0;
    FLASH_MLA_RETURN_IF_ERROR(check.data(kQ, q, alignment));
    FLASH_MLA_RETURN_IF_ERROR(check.data(kKvCache, kv, alignment));
    FLASH_MLA_RETURN_IF_ERROR(check.data(kBlockTable, table));
    FLASH_MLA_RETURN_IF_ERROR(check.data(kCacheSeqlens, lengths));
    FLASH_MLA_RETURN_IF_ERROR(check.data(kOut, out, alignment));
    if (lse.defined()) FLASH_MLA_RETURN_IF_ERROR(check.data(kLse, lse));
  }

  params->softmax_scale = static_cast<float>(scale);
  params->q = q.data;
  params->stride_q_b = q.stride[0];
  params->stride_q_s = q.stride[1];
  params->stride_q_h = q.stride[2];
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
  const Checker check(function);
  const TensorView &metadata = plan.metadata, &num_splits = plan.num_splits;
  FLASH_MLA_RETURN_IF_ERROR(check.form(kMetadata, metadata));
  FLASH_MLA_RETURN_IF_ERROR(check.device(kMetadata, metadata, device));
  FLASH_MLA_RETURN_IF_ERROR(check.dtype(kMetadata, metadata, DType::kInt32));
  FLASH_MLA_RETURN_IF_ERROR(check.extent(kMetadata, metadata, 1, kPlanRowInts, ""));
  if (metadata.shape[0] < 1)
    return check.invalid("plan.metadata.shape[0] (num_parts) = 0, wanted 1 or more");
  if (metadata.shape[0] > 1 && metadata.stride[0] != kPlanRowInts) {
    return check.invalid("plan.metadata.stride[0] (num_parts) = %lld, wanted %d (contiguous)",
                         static_cast<long long>(metadata.stride[0]), kPlanRowInts);
  }
  FLASH_MLA_RETURN_IF_ERROR(check.data(kMetadata, metadata));
  plan_params->metadata = static_cast<std::int32_t*>(metadata.data);
  plan_params->num_parts = static_cast<std::int32_t>(metadata.shape[0]);
  if (!num_splits.defined() && num_splits_optional) return {};
  FLASH_MLA_RETURN_IF_ERROR(check.form(kNumSplits, num_splits));
  FLASH_MLA_RETURN_IF_ERROR(check.device(kNumSplits, num_splits, device));
  FLASH_MLA_RETURN_IF_ERROR(check.dtype(kNumSplits, num_splits, DType::kInt32));
  FLASH_MLA_RETURN_IF_ERROR(
      check.extent(kNumSplits, num_splits, 0, std::int64_t{params.b} + 1, ""));
  FLASH_MLA_RETURN_IF_ERROR(check.data(kNumSplits, num_splits));
  plan_params->num_splits = static_cast<std::int32_t*>(num_splits.data);
  return {};
}

Status check_workspace(const char* function, const Workspace& workspace, std::size_t counters_size,
                       std::size_t partials_size) noexcept {
  const Checker check(function);
  const struct {
    const char* name;
    const void* data;
    std::size_t size, wanted;
  } areas[] = {{"counters", workspace.counters, workspace.counters_size, counters_size},
               {"partials", workspace.partials, workspace.partials_size, partials_size}};
  for (const auto& area : areas) {
    if (area.size < area.wanted) {
      return check.invalid("workspace.%s_size = %zu, wanted %zu or more (see workspace_size)",
                           area.name, area.size, area.wanted);
    }
    if (area.data == nullptr && area.size > 0) {
      return check.invalid("workspace.%s = null, wanted a pointer to %zu bytes", area.name,
                           area.size);
    }
    if (reinterpret_cast<std::uintptr_t>(area.data) % kWorkspaceAlignment != 0) {
      return check.invalid("workspace.%s = %p, wanted a multiple of %d bytes", area.name, area.data,
                           kWorkspaceAlignment);
    }
  }
  return {};
}

Status check_append_kv(const AppendKvArgs& args, AppendKvParams* params) noexcept {
  const Checker check("append_kv");
  const TensorView &kv_c = args.kv_c, &k_pe = args.k_pe, &kv = args.kv_cache;
  const TensorView& slots = args.slot_mapping;
  const Device device = kv_c.device;

  FLASH_MLA_RETURN_IF_ERROR(check.form(kKvC, kv_c));
  FLASH_MLA_RETURN_IF_ERROR(check_device("append_kv", "kv_c", device));
  FLASH_MLA_RETURN_IF_ERROR(check.float_dtype(kKvC, kv_c));
  FLASH_MLA_RETURN_IF_ERROR(check.fp32_is_cpu_only(kKvC, kv_c));
  FLASH_MLA_RETURN_IF_ERROR(check.extent(kKvC, kv_c, 1, kLatentDim, ""));

  FLASH_MLA_RETURN_IF_ERROR(check.form(kKPe, k_pe));
  FLASH_MLA_RETURN_IF_ERROR(check.device(kKPe, k_pe, device, " as kv_c"));
  FLASH_MLA_RETURN_IF_ERROR(check.dtype(kKPe, k_pe, kv_c.dtype, " as kv_c"));
  FLASH_MLA_RETURN_IF_ERROR(check.extent(kKPe, k_pe, 0, kv_c.shape[0], " as kv_c"));
  FLASH_MLA_RETURN_IF_ERROR(check.extent(kKPe, k_pe, 1, kRopeDim, ""));

  const Layout& kv_layout = kv.rank == 3 ? kKvCacheNoHead : kKvCache;
  FLASH_MLA_RETURN_IF_ERROR(check.form(kv_layout, kv));
  FLASH_MLA_RETURN_IF_ERROR(check.device(kv_layout, kv, device, " as kv_c"));
  FLASH_MLA_RETURN_IF_ERROR(check.float_dtype(kv_layout, kv));
  FLASH_MLA_RETURN_IF_ERROR(check.dtype(kv_layout, kv, kv_c.dtype, " as kv_c"));
  FLASH_MLA_RETURN_IF_ERROR(check.page_size(kv_layout, kv));
  if (kv.rank == 4) FLASH_MLA_RETURN_IF_ERROR(check.extent(kv_layout, kv, 2, 1, ""));
  FLASH_MLA_RETURN_IF_ERROR(check.head_dim(kv_layout, kv, kv.rank - 1, kHeadDimQk));
  FLASH_MLA_RETURN_IF_ERROR(check.no_overlap(kv_layout, kv));

  FLASH_MLA_RETURN_IF_ERROR(check.form(kSlotMapping, slots));
  FLASH_MLA_RETURN_IF_ERROR(check.device(kSlotMapping, slots, device, " as kv_c"));
  FLASH_MLA_RETURN_IF_ERROR(check.dtype(kSlotMapping, slots, DType::kInt64));
  FLASH_MLA_RETURN_IF_ERROR(check.extent(kSlotMapping, slots, 0, kv_c.shape[0], " as kv_c"));

  FLASH_MLA_RETURN_IF_ERROR(check.data(kKvC, kv_c));
  FLASH_MLA_RETURN_IF_ERROR(check.data(kKPe, k_pe));
  FLASH_MLA_RETURN_IF_ERROR(check.data(kv_layout, kv));
  FLASH_MLA_RETURN_IF_ERROR(check.data(kSlotMapping, slots));

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
  const Checker check("merge_states");
  const TensorView &out = args.out, &lse = args.lse;
  const Device device = out.device;

  if (args.num_parts < 1 || args.num_parts > kMaxMergeParts) {
    return check.invalid("num_parts = %d, wanted 1 .. %d", args.num_parts, kMaxMergeParts);
  }
  if (args.outs == nullptr || args.lses == nullptr) {
    return check.invalid("%s = null, wanted num_parts = %d tensors",
                         args.outs == nullptr ? "outs" : "lses", args.num_parts);
  }
  FLASH_MLA_RETURN_IF_ERROR(check.form(kOut, out));
  FLASH_MLA_RETURN_IF_ERROR(check_device("merge_states", "out", device));
  FLASH_MLA_RETURN_IF_ERROR(check.float_dtype(kOut, out));
  FLASH_MLA_RETURN_IF_ERROR(check.row_count(kOut, out.shape[0], out.shape[1], out.shape[2]));
  const std::int64_t d = out.shape[3];
  if (d < kDimStep || d > kMaxDim || d % kDimStep != 0) {
    return check.invalid("out.shape[3] (d_v) = %lld, wanted a multiple of %d up to %d",
                         static_cast<long long>(d), kDimStep, kMaxDim);
  }
  FLASH_MLA_RETURN_IF_ERROR(check.no_overlap(kOut, out));
  FLASH_MLA_RETURN_IF_ERROR(check.data(kOut, out));

  // The shape of every lse: [b, h_q, s_q] of out.
  const auto check_lse = [&](const Layout& layout, const TensorView& view) -> Status {
    FLASH_MLA_RETURN_IF_ERROR(check.form(layout, view, false));
    FLASH_MLA_RETURN_IF_ERROR(check.device(layout, view, device, " as out"));
    FLASH_MLA_RETURN_IF_ERROR(check.dtype(layout, view, DType::kFp32));
    FLASH_MLA_RETURN_IF_ERROR(check.extent(layout, view, 0, out.shape[0], " as out"));
    FLASH_MLA_RETURN_IF_ERROR(check.extent(layout, view, 1, out.shape[2], " as out"));
    FLASH_MLA_RETURN_IF_ERROR(check.extent(layout, view, 2, out.shape[1], " as out"));
    return check.data(layout, view);
  };
  FLASH_MLA_RETURN_IF_ERROR(check_lse(kLse, lse));
  FLASH_MLA_RETURN_IF_ERROR(check.no_overlap(kLse, lse));

  for (int part = 0; part < args.num_parts; ++part) {
    char name[16];
    Layout layout = kOut;
    layout.tensor = name;
    const TensorView& part_out = args.outs[part];
    std::snprintf(name, sizeof(name), "outs[%d]", part);
    FLASH_MLA_RETURN_IF_ERROR(check.form(layout, part_out));
    FLASH_MLA_RETURN_IF_ERROR(check.device(layout, part_out, device, " as out"));
    FLASH_MLA_RETURN_IF_ERROR(check.float_dtype(layout, part_out));
    if (part > 0) {
      FLASH_MLA_RETURN_IF_ERROR(check.dtype(layout, part_out, args.outs[0].dtype, " as outs[0]"));
    }
    for (int axis = 0; axis < 4; ++axis) {
      FLASH_MLA_RETURN_IF_ERROR(check.extent(layout, part_out, axis, out.shape[axis], " as out"));
    }
    FLASH_MLA_RETURN_IF_ERROR(check.data(layout, part_out));

    const TensorView& part_lse = args.lses[part];
    layout = kLse;
    layout.tensor = name;
    std::snprintf(name, sizeof(name), "lses[%d]", part);
    FLASH_MLA_RETURN_IF_ERROR(check_lse(layout, part_lse));

    params->parts[part] = {part_out.data,      static_cast<const float*>(part_lse.data),
                           part_out.stride[0], part_out.stride[1],
                           part_out.stride[2], part_lse.stride[0],
                           part_lse.stride[1], part_lse.stride[2]};
  }
  if (out.dtype != args.outs[0].dtype && out.dtype != DType::kFp32) {
    return check.error(StatusCode::kInvalidType, "out.dtype = %s, wanted %s as outs[0], or fp32",
                       dtype_name(out.dtype), dtype_name(args.outs[0].dtype));
  }
  FLASH_MLA_RETURN_IF_ERROR(check.empty_lse(args.empty_lse, &params->empty_lse));

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
