// One decode, from either way into it: the operator or the eager function.
#pragma once

#include "flash_mla/decode.h"
#include "tensor.h"

namespace flash_mla::python {

// False when the rows of q or out do not start at multiples of 16 bytes, as the GPU kernel has it.
[[nodiscard]] bool has_aligned_rows(const TensorView& view);

// True unless q has to be copied before a GPU can load it. Of a q of a wrong rank the library says
// what is wrong.
[[nodiscard]] bool is_ready(const TensorView& q);

// False for a q for whose results no memory should be asked for, because decode() refuses it.
[[nodiscard]] bool has_results(const TensorView& q);

// Decodes in PyTorch's current stream of q's device. Throws what check() throws.
void run_decode(const DecodeArgs& args, const DecodePlan& plan);

}  // namespace flash_mla::python
