// TestTensor: a strided tensor in host memory between guard bytes.
#include "test_tensor.h"

#include <algorithm>
#include <cstring>

namespace flash_mla::test {
namespace {

constexpr std::byte kGuardByte{0xC5};

// Offsets of all elements in row-major order.
std::vector<std::int64_t> offsets_of(const TensorView& view) {
  std::vector<std::int64_t> offsets = {0};
  for (int axis = 0; axis < view.rank; ++axis) {
    std::vector<std::int64_t> finer;
    finer.reserve(offsets.size() * view.shape[axis]);
    for (const std::int64_t offset : offsets) {
      for (std::int64_t i = 0; i < view.shape[axis]; ++i) {
        finer.push_back(offset + i * view.stride[axis]);
      }
    }
    offsets = std::move(finer);
  }
  return offsets;
}

double load(DType dtype, const void* address) {
  if (dtype == DType::kInt32) {
    std::int32_t value;
    std::memcpy(&value, address, sizeof(value));
    return value;
  }
  if (dtype == DType::kInt64) {
    std::int64_t value;
    std::memcpy(&value, address, sizeof(value));
    return static_cast<double>(value);
  }
  return reference::load(format_of(dtype), address);
}

void store(DType dtype, double value, void* address) {
  if (dtype == DType::kInt32) {
    const auto integer = static_cast<std::int32_t>(value);
    std::memcpy(address, &integer, sizeof(integer));
  } else if (dtype == DType::kInt64) {
    const auto integer = static_cast<std::int64_t>(value);
    std::memcpy(address, &integer, sizeof(integer));
  } else {
    reference::store(format_of(dtype), value, address);
  }
}

}  // namespace

reference::Format format_of(DType dtype) {
  return dtype == DType::kBf16   ? reference::Format::kBf16
         : dtype == DType::kFp16 ? reference::Format::kFp16
                                 : reference::Format::kFp32;
}

std::vector<double> read_values(const TensorView& view) {
  const std::vector<std::int64_t> offsets = offsets_of(view);
  std::vector<double> values(offsets.size());
  std::transform(offsets.begin(), offsets.end(), values.begin(), [&](std::int64_t offset) {
    return load(view.dtype, static_cast<std::byte*>(view.data) + offset * dtype_size(view.dtype));
  });
  return values;
}

TestTensor::TestTensor(DType dtype, std::vector<std::int64_t> shape,
                       std::vector<std::int64_t> stride) {
  view_.dtype = dtype;
  view_.rank = static_cast<std::int32_t>(shape.size());
  std::int64_t contiguous = 1, last = 0;
  for (int axis = view_.rank - 1; axis >= 0; --axis) {
    view_.shape[axis] = shape[axis];
    view_.stride[axis] = stride.empty() ? contiguous : stride[axis];
    contiguous *= std::max<std::int64_t>(shape[axis], 1);
    last += std::max<std::int64_t>(shape[axis] - 1, 0) * view_.stride[axis];
  }
  offsets_ = offsets_of(view_);
  bytes_.assign(2 * kGuard + (last + 1) * dtype_size(dtype) + kGuard, kGuardByte);
  lead_ = -reinterpret_cast<std::uintptr_t>(bytes_.data()) % kGuard;
}

TensorView TestTensor::view() {
  TensorView view = view_;
  if (view.defined()) view.data = bytes_.data() + lead_ + kGuard;
  return view;
}

void TestTensor::set(std::size_t index, double value) {
  store(view_.dtype, value,
        static_cast<std::byte*>(view().data) + offsets_[index] * dtype_size(view_.dtype));
}

void TestTensor::set_all(const std::vector<double>& values) {
  for (std::size_t i = 0; i < values.size(); ++i) set(i, values[i]);
}

bool TestTensor::guards_intact() const {
  std::vector<bool> owned(bytes_.size(), false);
  const int size = dtype_size(view_.dtype);
  for (const std::int64_t offset : offsets_) {
    for (int i = 0; i < size; ++i) owned[lead_ + kGuard + offset * size + i] = true;
  }
  for (std::size_t i = 0; i < bytes_.size(); ++i) {
    if (!owned[i] && bytes_[i] != kGuardByte) return false;
  }
  return true;
}

bool TestTensor::never_written() const {
  return std::all_of(bytes_.begin(), bytes_.end(), [](std::byte b) { return b == kGuardByte; });
}

}  // namespace flash_mla::test
