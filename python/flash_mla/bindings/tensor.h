// PyTorch tensors as the library sees them, and the library's errors as Python sees them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

#include "flash_mla/status.h"
#include "flash_mla/tensor.h"

namespace flash_mla::python {

using torch::stable::Tensor;

// View of `tensor`; `name` is what messages about it start with: "decode: q". Throws when it is
// None, or when no argument of the library takes its dtype.
TensorView view_of(const Tensor& tensor, const char* name);

// A new contiguous tensor on `device`, uninitialised, of at most kMaxRank axes. Comes from
// PyTorch's allocator, so inside a CUDA-graph capture it belongs to the graph's pool.
Tensor new_tensor(std::initializer_list<std::int64_t> shape, DType dtype, Device device);

// Throws unless `status` is ok: a std::runtime_error whose text starts with the Python type that is
// meant, in brackets, which the Python layer takes off. (What other C++ exceptions arrive as
// differs between versions of PyTorch: std::invalid_argument is ValueError in 2.11 and RuntimeError
// in 2.15.)
void check(const Status& status);

}  // namespace flash_mla::python
