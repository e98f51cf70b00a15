// Checker: one function per kind of check, and the messages of those that fail. For validate.cpp.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <limits>

#include "api/validate.h"
#include "flash_mla/decode.h"
#include "flash_mla/status.h"
#include "flash_mla/tensor.h"

namespace flash_mla::api {

inline constexpr std::int64_t kInt32Max = std::numeric_limits<std::int32_t>::max();
inline constexpr int kMaxPageSize = 256;
inline constexpr int kCudaAlignment = 16;  // bytes: TMA and 16-byte stores

inline constexpr const char* kFloatDTypes = "bf16, fp16 or fp32";

// Name, rank and axes of a tensor, as messages call them.
struct Layout {
  const char* tensor;
  int rank;
  const char* axes[4];
};

inline bool is_float(DType dtype) {
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

inline bool has_elements(const TensorView& view) {
  return std::all_of(view.shape, view.shape + view.rank,
                     [](std::int64_t extent) { return extent > 0; });
}

// The checks of one public function. A check that fails returns false and leaves its message, which
// names function, argument, got and wanted, in status().
class Checker {
 public:
  explicit Checker(const char* function) : function_(function) {}

  [[nodiscard]] const Status& status() const { return status_; }

  [[gnu::format(printf, 2, 3)]] bool invalid(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fail(StatusCode::kInvalidArgument, format, arguments);
    va_end(arguments);
    return false;
  }

  [[gnu::format(printf, 3, 4)]] bool error(StatusCode code, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fail(code, format, arguments);
    va_end(arguments);
    return false;
  }

  // A defined tensor of the layout's rank whose extents fit 32 bits and whose strides are not
  // negative and stay inside 63 bits. `last_contiguous`: the last axis has stride 1.
  bool form(const Layout& layout, const TensorView& view, bool last_contiguous = true) {
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
    // Bytes from the first element to the end of the last.
    std::int64_t span = dtype_size(view.dtype);
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
    return true;
  }

  bool extent(const Layout& layout, const TensorView& view, int axis, std::int64_t wanted,
              const char* source) {
    if (view.shape[axis] == wanted) return true;
    return invalid("%s.shape[%d] (%s) = %lld, wanted %lld%s", layout.tensor, axis,
                   layout.axes[axis], static_cast<long long>(view.shape[axis]),
                   static_cast<long long>(wanted), source);
  }

  bool head_dim(const Layout& layout, const TensorView& view, int axis, int supported) {
    if (view.shape[axis] == supported) return true;
    return invalid("%s.shape[%d] (%s) = %lld, this build supports {%d}", layout.tensor, axis,
                   layout.axes[axis], static_cast<long long>(view.shape[axis]), supported);
  }

  bool dtype(const Layout& layout, const TensorView& view, DType wanted, const char* source = "") {
    if (view.dtype == wanted) return true;
    return error(StatusCode::kInvalidType, "%s.dtype = %s, wanted %s%s", layout.tensor,
                 dtype_name(view.dtype), dtype_name(wanted), source);
  }

  // bf16 and fp16; fp32 on the CPU.
  bool float_dtype(const Layout& layout, const TensorView& view) {
    if (view.dtype == DType::kFp8E4M3) {
      return error(StatusCode::kUnsupported,
                   "%s.dtype = fp8_e4m3, not supported by this build; wanted %s", layout.tensor,
                   kFloatDTypes);
    }
    if (!is_float(view.dtype)) {
      return error(StatusCode::kInvalidType, "%s.dtype = %s, wanted %s", layout.tensor,
                   dtype_name(view.dtype), kFloatDTypes);
    }
    return true;
  }

  bool device_exists(const char* tensor, Device device) {
    status_ = check_device(function_, tensor, device);
    return status_.ok();
  }

  bool device(const Layout& layout, const TensorView& view, Device wanted,
              const char* source = " as q") {
    if (view.device == wanted) return true;
    if (!device_exists(layout.tensor, view.device)) return false;
    return invalid("%s.device = %s, wanted %s%s", layout.tensor, DeviceText(view.device).text,
                   DeviceText(wanted).text, source);
  }

  // A pointer, aligned to `alignment` bytes, where the tensor has an element.
  bool data(const Layout& layout, const TensorView& view, int alignment = 0) {
    if (!has_elements(view)) return true;
    if (view.data == nullptr) {
      return invalid("%s.data = null, wanted a pointer", layout.tensor);
    }
    const int wanted = std::max(alignment, dtype_size(view.dtype));
    if (reinterpret_cast<std::uintptr_t>(view.data) % wanted != 0) {
      return invalid("%s.data = %p, wanted a multiple of %d bytes", layout.tensor, view.data,
                     wanted);
    }
    return true;
  }

  // Strides of all axes but the last are multiples of 16 bytes.
  bool aligned_strides(const Layout& layout, const TensorView& view) {
    const int elements = kCudaAlignment / dtype_size(view.dtype);
    for (int axis = 0; axis + 1 < view.rank; ++axis) {
      if (view.shape[axis] > 1 && view.stride[axis] % elements != 0) {
        return invalid("%s.stride[%d] (%s) = %lld, wanted a multiple of %d elements (%d bytes)",
                       layout.tensor, axis, layout.axes[axis],
                       static_cast<long long>(view.stride[axis]), elements, kCudaAlignment);
      }
    }
    return true;
  }

  // No two elements at one address. Axes sorted by stride must each step over all the finer ones:
  // sufficient, and also necessary but for layouts that nobody uses.
  bool no_overlap(const Layout& layout, const TensorView& view) {
    if (!has_elements(view)) return true;
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
    return true;
  }

  // rows = b * s_q * h_q are counted in 32 bits by the backends.
  bool row_count(const Layout& layout, std::int64_t b, std::int64_t s_q, std::int64_t h_q) {
    if (s_q * h_q <= kInt32Max && (s_q * h_q == 0 || b <= kInt32Max / (s_q * h_q))) return true;
    return invalid("%s has %lld * %lld * %lld rows (b * s_q * h_q), wanted at most 2147483647",
                   layout.tensor, static_cast<long long>(b), static_cast<long long>(s_q),
                   static_cast<long long>(h_q));
  }

  bool page_size(const Layout& layout, const TensorView& view) {
    if (view.shape[1] >= 1 && view.shape[1] <= kMaxPageSize) return true;
    return invalid("%s.shape[1] (page_size) = %lld, wanted 1 .. %d", layout.tensor,
                   static_cast<long long>(view.shape[1]), kMaxPageSize);
  }

  bool empty_lse(EmptyLse value, float* infinity) {
    if (value != EmptyLse::kPositiveInfinity && value != EmptyLse::kNegativeInfinity) {
      return invalid("empty_lse = %d, wanted 0 (+inf) or 1 (-inf)", static_cast<int>(value));
    }
    const float inf = std::numeric_limits<float>::infinity();
    *infinity = value == EmptyLse::kPositiveInfinity ? inf : -inf;
    return true;
  }

  bool fp32_is_cpu_only(const Layout& layout, const TensorView& view) {
    if (view.device.type == DeviceType::kCpu || view.dtype != DType::kFp32) return true;
    return error(StatusCode::kUnsupported,
                 "%s.dtype = fp32, wanted bf16 or fp16 on a GPU; fp32 runs on the CPU",
                 layout.tensor);
  }

 private:
  [[gnu::format(printf, 3, 0)]] void fail(StatusCode code, const char* format, va_list arguments) {
    char text[Status::kMaxMessage];
    std::vsnprintf(text, sizeof(text), format, arguments);
    status_ = Status::error(code, "%s: %s", function_, text);
  }

  const char* function_;
  Status status_;
};

}  // namespace flash_mla::api
