// Workspaces of decodes on a GPU: cached for eager calls, made anew under CUDA-graph capture.
#include "workspace.h"

#include <dlfcn.h>

#include <algorithm>
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

struct EagerBuffers {
  std::optional<Tensor> counters, partials;
  std::size_t counters_size = 0, partials_size = 0;
};

// Counters of one (capture, stream).
struct CaptureCounters {
  void* data = nullptr;
  std::size_t size = 0;
};

// Zeroed memory that is cut into counters and never freed: a captured graph may be replayed at any
// later time.
struct CounterSlab {
  std::byte* next = nullptr;
  std::size_t left = 0;
};

struct Sizes {
  std::size_t counters = 0, partials = 0;
};

struct Cache {
  std::mutex mutex;
  // NOTE: asked for once, because the library gives the same sizes for all shapes on a device
  // (decode_config.cpp). If that ends, decode() says that the workspace is too small.
  std::map<std::int32_t, Sizes> sizes;
  std::map<std::tuple<std::int32_t, StreamHandle>, EagerBuffers> eager;
  std::map<std::tuple<std::int32_t, std::uint64_t, StreamHandle>, CaptureCounters> captured;
  std::map<std::int32_t, CounterSlab> slabs;
};

// NOTE: never destroyed: at the end of the process PyTorch may have gone before us.
Cache& cache() {
  static Cache* const kCache = new Cache;
  return *kCache;
}

constexpr std::size_t kSlabSize = std::size_t{1} << 20;
constexpr std::size_t kAlignment = 256;

std::size_t round_up(std::size_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

Tensor new_bytes(std::size_t size, Device device) {
  return new_tensor({static_cast<std::int64_t>(size)}, DType::kUInt8, device);
}

void* take_counters(CounterSlab& slab, std::size_t size, Device device) {
  size = round_up(size);
  if (slab.left < size) {
    const std::size_t slab_size = std::max(size, kSlabSize);
    void* data = nullptr;
    check(cuda::allocate_counters(device.index, slab_size, &data));
    slab = {static_cast<std::byte*>(data), slab_size};
  }
  void* const taken = slab.next;
  slab.next += size;
  slab.left -= size;
  return taken;
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
  const auto [counters_size, partials_size] = sizes;
  if (capturing) {
    CaptureCounters& counters = shared.captured[{device.index, capture_id, stream}];
    if (counters.size < counters_size) {
      counters = {take_counters(shared.slabs[device.index], counters_size, device), counters_size};
    }
    partials_ = new_bytes(partials_size, device);
    workspace_ = {counters.data, counters.size, partials_->mutable_data_ptr(), partials_size};
    return;
  }
  EagerBuffers& buffers = shared.eager[{device.index, stream}];
  if (!buffers.partials || buffers.partials_size < partials_size) {
    buffers.partials.reset();  // first, so that the allocator may use it for the larger one
    buffers.partials = new_bytes(partials_size, device);
    buffers.partials_size = partials_size;
  }
  const bool new_counters = !buffers.counters || buffers.counters_size < counters_size;
  if (new_counters) {
    buffers.counters_size = 0;  // stands if the initialisation below fails
    buffers.counters = new_bytes(counters_size, device);
  }
  counters_ = buffers.counters;
  partials_ = buffers.partials;
  workspace_ = {counters_->mutable_data_ptr(), std::max(counters_size, buffers.counters_size),
                partials_->mutable_data_ptr(), buffers.partials_size};
  if (new_counters) {
    check(init_workspace(workspace_, device, stream));
    buffers.counters_size = counters_size;
  }
}

#else

DecodeWorkspace::DecodeWorkspace(const DecodeArgs&, StreamHandle) {}

#endif

}  // namespace flash_mla::python
