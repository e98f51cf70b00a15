// One decode, from either way into it: the operator or the eager function.
#include "decode_call.h"

#include <cstdint>
#include <limits>

#include "torch_threads.h"
#include "workspace.h"

namespace flash_mla::python {

bool has_aligned_rows(const TensorView& view) {
  if (view.device.type != DeviceType::kCuda || view.rank != 4 || view.stride[3] != 1) return true;
  const std::int64_t elements = 16 / dtype_size(view.dtype);
  if (reinterpret_cast<std::uintptr_t>(view.data) % 16 != 0) return false;
  for (int axis = 0; axis < 3; ++axis) {
    if (view.shape[axis] > 1 && view.stride[axis] % elements != 0) return false;
  }
  return true;
}

bool is_ready(const TensorView& q) {
  if (!has_aligned_rows(q)) return false;
  if (q.device.type != DeviceType::kCuda || q.rank != 4) return true;
  for (int axis = 0; axis < 3; ++axis) {
    if (q.shape[axis] > 1 && q.stride[axis] == 0) return false;  // expanded: no map of it
  }
  return true;
}

bool has_results(const TensorView& q) {
  return q.rank == 4 && static_cast<double>(q.shape[0]) * q.shape[1] * q.shape[2] <=
                            std::numeric_limits<std::int32_t>::max();
}

void run_decode(const DecodeArgs& args, const DecodePlan& plan) {
  const Device device = args.q.device;
  follow_torch_threads(device);
  const StreamHandle stream = current_stream(device);
  const DecodeWorkspace workspace(args, stream);
  check(decode(args, plan.metadata.defined() ? &plan : nullptr, workspace.get(), stream));
}

}  // namespace flash_mla::python
