// TensorView: a borrowed, strided tensor. The library never owns, copies or frees what it points
// to.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace flash_mla {

// The values are part of the C ABI (c_api.h) and never change.
enum class DType : std::int32_t {
  kUndefined = 0,
  kBf16 = 1,
  kFp16 = 2,
  kFp32 = 3,
  kInt32 = 4,
  kInt64 = 5,
  kFp8E4M3 = 6,
  kUInt8 = 7,
};

enum class DeviceType : std::int32_t { kCpu = 0, kCuda = 1 };

struct Device {
  DeviceType type = DeviceType::kCpu;
  std::int32_t index = 0;  // CUDA device ordinal; 0 for the CPU
  friend constexpr bool operator==(Device, Device) noexcept = default;
};

inline constexpr int kMaxRank = 6;

// A view of `rank` axes. `stride` is in elements, not bytes; `data` may be null where a tensor is
// optional (then `dtype` is kUndefined) or where it has no element.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kUndefined;
  Device device = {};
  std::int32_t rank = 0;
  std::int64_t shape[kMaxRank] = {};
  std::int64_t stride[kMaxRank] = {};

  [[nodiscard]] constexpr bool defined() const noexcept { return dtype != DType::kUndefined; }
};

// Bytes per element; 0 for kUndefined.
[[nodiscard]] int dtype_size(DType dtype) noexcept;
// "bf16", "fp16", "fp32", "int32", "int64", "fp8_e4m3", "uint8"; "undefined" otherwise. Never null.
[[nodiscard]] const char* dtype_name(DType dtype) noexcept;

// Row-major contiguous view. `shape` has at most kMaxRank axes; further ones are ignored, and the
// rank, which then exceeds kMaxRank, is refused by every function.
[[nodiscard]] constexpr TensorView contiguous_view(
    void* data, DType dtype, Device device, std::initializer_list<std::int64_t> shape) noexcept {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.device = device;
  view.rank = static_cast<std::int32_t>(shape.size());
  int axis = 0;
  for (const std::int64_t extent : shape) {
    if (axis < kMaxRank) view.shape[axis++] = extent;
  }
  std::int64_t stride = 1;
  while (axis-- > 0) {
    view.stride[axis] = stride;
    stride *= view.shape[axis] > 0 ? view.shape[axis] : 1;
  }
  return view;
}

}  // namespace flash_mla
