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

// Throws unless `status` is ok. std::invalid_argument arrives as ValueError; everything else as
// RuntimeError, so the text of an error that Python raises as another type starts with that type in
// brackets, which the Python layer takes off.
void check(const Status& status);

}  // namespace flash_mla::python
