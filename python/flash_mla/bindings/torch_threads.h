// The CPU backend on PyTorch's threads.
#pragma once

#include "flash_mla/tensor.h"

namespace flash_mla::python {

// The CPU backend uses as many threads as PyTorch does. Called before every call that runs there.
void follow_torch_threads(Device device);

}  // namespace flash_mla::python
