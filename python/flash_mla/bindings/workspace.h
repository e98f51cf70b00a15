// The device memory that a decode on a GPU needs, kept between calls.
#pragma once

#include <cstddef>
#include <optional>

#include "flash_mla/decode.h"
#include "tensor.h"

namespace flash_mla::python {

// PyTorch's current stream on a CUDA device; null on the CPU. Throws when PyTorch has no CUDA.
StreamHandle current_stream(Device device);

// A workspace for one decode in `stream`. Eager calls share one workspace for each (device,
// stream), which is never given back. Under CUDA-graph capture nothing is shared with eager calls:
// partial results come from PyTorch's allocator, so from the graph's pool; counters come from
// memory that no graph owns, one piece for each (capture, stream), because graphs that replay at
// the same time on two streams must not count in the same place.
class DecodeWorkspace {
 public:
  DecodeWorkspace(const DecodeArgs& args, StreamHandle stream);

  [[nodiscard]] const Workspace& get() const { return workspace_; }

 private:
  Workspace workspace_;
  std::optional<Tensor> partials_;  // of a capture, held until after the launch
};

}  // namespace flash_mla::python
