// The CPU backend on PyTorch's threads. After an operator these spin for milliseconds, in the hope
// of the next one, and a second set of threads would have to share the cores with them.
#include "torch_threads.h"

#include <torch/csrc/stable/c/shim.h>

#include <atomic>
#include <cstdint>

#include "cpu/threads.h"
#include "flash_mla/backend.h"
#include "tensor.h"

namespace flash_mla::python {
namespace {

struct Call {
  cpu::Work work;
  void* context;
};

void run_on_torch_threads(std::int32_t num_threads, cpu::Work work, void* context) {
  Call call = {work, context};
  const auto run = [](std::int64_t begin, std::int64_t end, void* call_to_make) {
    const Call& call = *static_cast<Call*>(call_to_make);
    for (std::int64_t thread = begin; thread < end; ++thread) {
      call.work(call.context, static_cast<std::int32_t>(thread));
    }
  };
  // An error, as when there are no threads to be had, leaves work undone: parallel_for does it.
  static_cast<void>(torch_parallel_for(0, num_threads, 1, run, &call));
}

// When the extension is loaded, so that a child forked off later falls back to the backend's own
// threads: PyTorch's are not there, and waiting for them it would hang.
[[maybe_unused]] const bool runner_is_set = (cpu::set_runner(run_on_torch_threads), true);

}  // namespace

void follow_torch_threads(Device device) {
  if (device.type != DeviceType::kCpu) return;
  static std::atomic<std::uint32_t> last{0};
  std::uint32_t threads = 0;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  if (threads == last.exchange(threads)) return;
  check(set_cpu_num_threads(static_cast<std::int32_t>(threads)));
}

}  // namespace flash_mla::python
