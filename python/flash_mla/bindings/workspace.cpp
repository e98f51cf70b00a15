// Workspaces of decodes on a GPU: kept for eager calls, made anew under CUDA-graph capture.
#include "workspace.h"

#include <dlfcn.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>

#if defined(FLASH_MLA_WITH_CUDA)
#include "cuda/common/host.h"
#endif

namespace flash_mla::python {
namespace {

using CurrentStreamFunction = AOTITorchError (*)(std::int32_t device_index, void** stream);

// Only PyTorch's CUDA half has it, so it is looked up where that is loaded: the extension loads
// without.
CurrentStreamFunction find_current_stream_function() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<CurrentStreamFunction>(
      dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

#if defined(FLASH_MLA_WITH_CUDA)

// Of one (device, stream).
struct EagerWorkspace {
  Workspace areas;
  std::optional<Tensor> owner;  // of the areas, where they are PyTorch's
};

// Counters of one (capture, stream).
struct CaptureCounters {
  void* data = nullptr;
  std::size_t size = 0;
};

struct Sizes {
  std::size_t counters = 0, partials = 0;
};

struct Cache {
  std::mutex mutex;
  // NOTE: asked for once, because the library gives the same sizes for all shapes on a device
  // (decode_config.cpp). If that ends, decode() says that the workspace is too small.
  std::map<std::int32_t, Sizes> sizes;
  std::map<std::tuple<std::int32_t, StreamHandle>, EagerWorkspace> eager;
  std::map<std::tuple<std::int32_t, std::uint64_t, StreamHandle>, CaptureCounters> captured;
};

// NOTE: never destroyed: at the end of the process PyTorch may have gone before us.
Cache& cache() {
  static Cache* const kCache = new Cache;
  return *kCache;
}

Tensor new_bytes(std::size_t size, Device device) {
  return new_tensor({static_cast<std::int64_t>(size)}, DType::kUInt8, device);
}

// From the driver, since PyTorch's allocator may be giving out the memory of a CUDA graph: while it
// warms a graph up, as torch.compile(mode="reduce-overhead") does, what is kept is an error. From
// PyTorch, which may have cached memory to give back, when the driver has none left.
EagerWorkspace new_eager_workspace(const Sizes& sizes, Device device, StreamHandle stream) {
  constexpr std::size_t kAlignment = 256;
  const std::size_t offset = (sizes.counters + kAlignment - 1) / kAlignment * kAlignment;
  EagerWorkspace result;
  void* data = nullptr;
  const bool zeroed = cuda::allocate_counters(device.index, offset + sizes.partials, &data).ok();
  if (!zeroed) {
    result.owner = new_bytes(offset + sizes.partials, device);
    data = result.owner->mutable_data_ptr();
  }
  result.areas = {data, sizes.counters, static_cast<std::byte*>(data) + offset, sizes.partials};
  if (!zeroed) check(init_workspace(result.areas, device, stream));
  return result;
}

#endif

}  // namespace

StreamHandle current_stream(Device device) {
  if (device.type == DeviceType::kCpu) return nullptr;
  static const CurrentStreamFunction kFunction = find_current_stream_function();
  if (kFunction == nullptr) {
    check(
        Status::error(StatusCode::kUnavailable,
                      "flash_mla: a CUDA tensor was given, but PyTorch's CUDA half is not loaded"));
  }
  StreamHandle stream = nullptr;
  TORCH_ERROR_CODE_CHECK(kFunction(device.index, &stream));
  return stream;
}

#if defined(FLASH_MLA_WITH_CUDA)

DecodeWorkspace::DecodeWorkspace(const DecodeArgs& args, StreamHandle stream) {
  const Device device = args.q.device;
  if (device.type == DeviceType::kCpu) return;
  std::uint64_t capture_id = 0;
  const bool capturing = cuda::is_capturing(stream, &capture_id);
  Cache& shared = cache();
  const std::lock_guard lock(shared.mutex);
  Sizes& sizes = shared.sizes[device.index];
  // Of arguments for which there is no size, decode() says what is wrong with them.
  if (sizes.partials == 0 && !workspace_size(args, &sizes.counters, &sizes.partials).ok()) return;
  if (capturing) {
    CaptureCounters& counters = shared.captured[{device.index, capture_id, stream}];
    if (counters.size < sizes.counters) {
      check(cuda::allocate_counters(device.index, sizes.counters, &counters.data));
      counters.size = sizes.counters;
    }
    partials_ = new_bytes(sizes.partials, device);
    workspace_ = {counters.data, counters.size, partials_->mutable_data_ptr(), sizes.partials};
    return;
  }
  EagerWorkspace& eager = shared.eager[{device.index, stream}];
  if (eager.areas.partials == nullptr) eager = new_eager_workspace(sizes, device, stream);
  workspace_ = eager.areas;
}

#else

DecodeWorkspace::DecodeWorkspace(const DecodeArgs&, StreamHandle) {}

#endif

}  // namespace flash_mla::python
