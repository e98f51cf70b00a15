// Random tensors for calls of the C API, and what is known about them before the call.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <map>
#include <random>
#include <vector>

#include "flash_mla/c_api.h"
#include "flash_mla/tensor.h"
#include "test_tensor.h"

namespace flash_mla::test {

// A tensor in memory of its own, with room behind it for strides and extents that grew.
struct Arena {
  std::vector<std::byte> bytes;
  flash_mla_tensor tensor = {};
};

// What is known about a tensor before the call.
enum class Verdict {
  kInside,    // all elements lie in the arena: the call may be made
  kMustFail,  // no such tensor can exist: the call may be made, and has to fail
  kOutside,   // looks fine but leaves the arena: nobody could tell, so the call must not be made
};

inline TensorView view_of(const flash_mla_tensor& tensor) {
  TensorView view;
  view.data = tensor.data;
  view.dtype = static_cast<DType>(tensor.dtype);
  view.rank = tensor.rank;
  std::copy_n(tensor.shape, kMaxRank, view.shape);
  std::copy_n(tensor.stride, kMaxRank, view.stride);
  return view;
}

class Fuzzer {
 public:
  explicit Fuzzer(std::uint32_t seed) : random_(seed) {}

  std::int64_t draw(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random_);
  }
  bool chance(int percent) { return draw(1, 100) <= percent; }
  template <typename T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[draw(0, static_cast<std::int64_t>(values.size()) - 1)];
  }

  // A contiguous tensor of random numbers, three times as large as it needs to be.
  Arena make(DType dtype, const std::vector<std::int64_t>& shape) {
    Arena arena;
    std::int64_t count = 1;
    for (int axis = static_cast<int>(shape.size()) - 1; axis >= 0; --axis) {
      arena.tensor.shape[axis] = shape[axis];
      arena.tensor.stride[axis] = count;
      count *= shape[axis];
    }
    arena.tensor.rank = static_cast<std::int32_t>(shape.size());
    arena.tensor.dtype = static_cast<std::int32_t>(dtype);
    const std::int64_t size = dtype_size(dtype), room = 3 * count + 64;
    arena.bytes.resize(room * size);
    arena.tensor.data = arena.bytes.data();
    if (dtype != DType::kInt32 && dtype != DType::kInt64) {
      const std::vector<std::byte>& pool = numbers(dtype);
      std::memcpy(arena.bytes.data(), &pool[size * draw(0, pool.size() / size - room)],
                  arena.bytes.size());
    }
    return arena;
  }

  void mutate(flash_mla_tensor& tensor) {
    const auto axis = draw(0, std::max(0, std::min(tensor.rank, kMaxRank) - 1));
    std::int64_t& extent = tensor.shape[axis];
    std::int64_t& stride = tensor.stride[axis];
    // Already changed by an earlier mutation: left alone, so that the sums below stay in range.
    if (extent > 1 << 20 || stride > 1 << 20) return;
    switch (draw(0, 7)) {
      case 0:
        tensor.dtype = static_cast<std::int32_t>(draw(-1, 9));
        break;
      case 1:
        tensor.rank = pick({-1, 0, 1, 2, 3, 4, 5, 6, 7, 1000});
        break;
      case 2:
        tensor.device_type = pick({0, 1, 2, -1});
        tensor.device_index = pick({0, -1, 1, 99});
        break;
      case 3:
      case 4:
        extent = pick<std::int64_t>({-1, 0, 1, 2, extent + 1, extent - 1, 2 * extent,
                                     std::int64_t{1} << 31, std::int64_t{1} << 62});
        break;
      case 5:
        stride = pick<std::int64_t>({-1, 0, 1, 2, stride / 2, 2 * stride, stride + 1,
                                     std::int64_t{1} << 40, std::int64_t{1} << 61,
                                     std::numeric_limits<std::int64_t>::max()});
        break;
      case 6:
        tensor.data = chance(50) || tensor.data == nullptr
                          ? nullptr
                          : static_cast<std::byte*>(tensor.data) + draw(1, 4);
        break;
      default:
        if (chance(30)) tensor = {};
    }
  }

 private:
  // Random numbers of a floating-point dtype, more than any arena takes.
  const std::vector<std::byte>& numbers(DType dtype) {
    std::vector<std::byte>& pool = pools_[dtype];
    if (pool.empty()) {
      constexpr int kCount = 200000;
      const int size = dtype_size(dtype);
      pool.resize(std::size_t{kCount} * size);
      for (int i = 0; i < kCount; ++i) {
        reference::store(format_of(dtype), 0.01 * static_cast<double>(draw(-200, 200)),
                         &pool[i * size]);
      }
    }
    return pool;
  }

  std::mt19937 random_;
  std::map<DType, std::vector<std::byte>> pools_;
};

inline Verdict judge(const Arena& arena, int rank) {
  const flash_mla_tensor& tensor = arena.tensor;
  const int size = dtype_size(static_cast<DType>(tensor.dtype));
  if (tensor.dtype == 0) return Verdict::kInside;  // not given: nothing to look at
  if (size == 0 || tensor.rank != rank) return Verdict::kMustFail;
  __int128 reach = 0;
  bool empty = false;
  for (int axis = 0; axis < rank; ++axis) {
    const std::int64_t extent = tensor.shape[axis], stride = tensor.stride[axis];
    if (extent < 0 || extent >= std::int64_t{1} << 31) return Verdict::kMustFail;
    if (extent > 1 && stride < 0) return Verdict::kMustFail;
    if (extent > 1) reach += static_cast<__int128>(extent - 1) * stride;
    empty = empty || extent == 0;
  }
  if (empty) return Verdict::kInside;
  if (tensor.data == nullptr) return Verdict::kMustFail;
  const std::int64_t offset = static_cast<std::byte*>(tensor.data) - arena.bytes.data();
  return offset >= 0 && offset + (reach + 1) * size <= static_cast<__int128>(arena.bytes.size())
             ? Verdict::kInside
             : Verdict::kOutside;
}

// The worst of several tensors: one that must fail makes the others harmless.
class Judgement {
 public:
  void add(const Arena& arena, int rank) {
    const Verdict verdict = judge(arena, rank);
    must_fail_ = must_fail_ || verdict == Verdict::kMustFail;
    outside_ = outside_ || verdict == Verdict::kOutside;
  }
  [[nodiscard]] bool callable() const { return must_fail_ || !outside_; }
  [[nodiscard]] bool must_fail() const { return must_fail_; }

 private:
  bool must_fail_ = false, outside_ = false;
};

// Bytes of `now` that belong to no element of `tensor` are as they were.
inline bool only_elements_changed(const std::vector<std::byte>& before, const Arena& now) {
  std::vector<std::byte> masked = now.bytes;
  const TensorView view = view_of(now.tensor);
  const int size = dtype_size(view.dtype);
  const std::int64_t base = static_cast<std::byte*>(view.data) - now.bytes.data();
  std::vector<std::int64_t> index(std::max(view.rank, 1), 0);
  for (int axis = 0; axis < view.rank; ++axis) {
    if (view.shape[axis] == 0) return masked == before;
  }
  for (int axis = 0; axis >= 0;) {
    std::int64_t at = base;
    for (int i = 0; i < view.rank; ++i) at += index[i] * view.stride[i] * size;
    std::copy_n(&before[at], size, &masked[at]);
    for (axis = view.rank - 1; axis >= 0 && ++index[axis] == view.shape[axis]; --axis) {
      index[axis] = 0;
    }
  }
  return masked == before;
}

}  // namespace flash_mla::test
