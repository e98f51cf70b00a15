// TestTensor: a strided tensor in host memory between guard bytes, read and written as doubles.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "flash_mla/tensor.h"
#include "reference/numbers.h"

namespace flash_mla::test {

reference::Format format_of(DType dtype);

// Elements of a view in row-major order; floating-point and integer dtypes alike.
std::vector<double> read_values(const TensorView& view);

class TestTensor {
 public:
  // Before the first element and behind the last; also the base's alignment.
  static constexpr std::size_t kGuard = 256;

  TestTensor() = default;
  TestTensor(TestTensor&&) = default;
  TestTensor& operator=(TestTensor&&) = default;
  // Contiguous when `stride` is empty. Elements start as guard bytes, too: NaN-like garbage.
  TestTensor(DType dtype, std::vector<std::int64_t> shape, std::vector<std::int64_t> stride = {});

  [[nodiscard]] TensorView view();
  [[nodiscard]] std::size_t num_elements() const { return offsets_.size(); }
  [[nodiscard]] std::vector<double> values() { return read_values(view()); }
  // `index` in row-major order. Floating-point values are rounded to the dtype.
  void set(std::size_t index, double value);
  void set_all(const std::vector<double>& values);

  // All bytes that count, guards included; the first element lies kGuard bytes in.
  [[nodiscard]] std::span<std::byte> storage() {
    return std::span(bytes_).subspan(lead_, bytes_.size() - kGuard);
  }
  // True when every byte that belongs to no element is as it was made.
  [[nodiscard]] bool guards_intact() const;
  // True when the elements, too, are as they were made.
  [[nodiscard]] bool never_written() const;

 private:
  TensorView view_;
  std::vector<std::byte> bytes_;
  std::vector<std::int64_t> offsets_;  // of every element in row-major order, in elements
  std::size_t lead_ = 0;               // bytes that align the allocation
};

}  // namespace flash_mla::test
