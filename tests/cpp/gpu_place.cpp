// Device memory, streams and graphs for the tests. A CUDA error here ends the test program: nothing
// after it would mean anything.
#include "gpu_place.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "flash_mla/backend.h"

namespace flash_mla::test {
namespace {

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", call, cudaGetErrorString(error));
  std::abort();
}
#define CHECK_CUDA(call) check(call, #call)

constexpr std::size_t kGuard = TestTensor::kGuard;
constexpr std::byte kFill{0xFF};

bool filled(std::span<const std::byte> bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == kFill; });
}

}  // namespace

std::string why_no_gpu() {
  CudaDeviceInfo info;
  const Status status = cuda_device_info(0, &info);
  return status.ok() ? info.why_not : status.message();
}

DeviceBuffer::DeviceBuffer(std::size_t size) : size_(size) {
  void* data = nullptr;
  CHECK_CUDA(cudaMalloc(&data, std::max<std::size_t>(size, 1)));
  data_ = static_cast<std::byte*>(data);
  CHECK_CUDA(cudaMemset(data_, static_cast<int>(kFill), size));
  CHECK_CUDA(cudaDeviceSynchronize());
}

DeviceBuffer::~DeviceBuffer() { static_cast<void>(cudaFree(data_)); }

void DeviceBuffer::upload(std::span<const std::byte> bytes) {
  CHECK_CUDA(cudaMemcpy(data_, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  CHECK_CUDA(cudaDeviceSynchronize());
}

void DeviceBuffer::download(std::span<std::byte> bytes) {
  CHECK_CUDA(cudaDeviceSynchronize());
  CHECK_CUDA(cudaMemcpy(bytes.data(), data_, bytes.size(), cudaMemcpyDeviceToHost));
}

TensorView GpuPlace::put_as(TestTensor& tensor, TestTensor& source) {
  TensorView view = tensor.view();
  if (!view.defined()) return view;
  const std::span<std::byte> bytes = source.storage();
  std::unique_ptr<DeviceBuffer>& buffer = buffers_[&tensor];
  if (buffer == nullptr || buffer->size() != bytes.size()) {
    buffer = std::make_unique<DeviceBuffer>(bytes.size());
  }
  buffer->upload(bytes);
  view.data = buffer->data() + kGuard;
  view.device = {DeviceType::kCuda, 0};
  return view;
}

void GpuPlace::take_back(TestTensor& tensor) {
  if (const auto found = buffers_.find(&tensor); found != buffers_.end()) {
    found->second->download(tensor.storage());
  }
}

GpuWorkspace::GpuWorkspace(const DecodeArgs& args) {
  const Status sized = workspace_size(args, &workspace_.counters_size, &workspace_.partials_size);
  if (!sized.ok()) {
    std::fprintf(stderr, "%s\n", sized.message());
    std::abort();
  }
  counters_ = std::make_unique<DeviceBuffer>(workspace_.counters_size + 2 * kGuard);
  partials_ = std::make_unique<DeviceBuffer>(workspace_.partials_size + 2 * kGuard);
  workspace_.counters = counters_->data() + kGuard;
  workspace_.partials = partials_->data() + kGuard;
  Stream stream;
  const Status initialised = init_workspace(workspace_, {DeviceType::kCuda, 0}, stream.get());
  if (!initialised.ok()) {
    std::fprintf(stderr, "%s\n", initialised.message());
    std::abort();
  }
  stream.synchronize();
  first_ = snapshot();
}

std::vector<std::byte> GpuWorkspace::snapshot() {
  std::vector<std::byte> bytes(counters_->size());
  counters_->download(bytes);
  return bytes;
}

std::vector<std::byte> GpuWorkspace::partials() {
  std::vector<std::byte> all(partials_->size());
  partials_->download(all);
  return {all.begin() + kGuard, all.end() - kGuard};
}

void GpuWorkspace::set_partials(std::span<const std::byte> bytes) {
  std::vector<std::byte> all(partials_->size());
  partials_->download(all);
  std::copy(bytes.begin(), bytes.end(), all.begin() + kGuard);
  partials_->upload(all);
}

bool GpuWorkspace::intact() {
  std::vector<std::byte> partials(partials_->size());
  partials_->download(partials);
  const std::span<const std::byte> all(partials);
  return snapshot() == first_ && filled(all.first(kGuard)) && filled(all.last(kGuard)) &&
         filled(std::span(first_).first(kGuard)) && filled(std::span(first_).last(kGuard));
}

Stream::Stream() {
  cudaStream_t stream = nullptr;
  CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  stream_ = stream;
}

Stream::~Stream() { static_cast<void>(cudaStreamDestroy(static_cast<cudaStream_t>(stream_))); }

void Stream::synchronize() {
  CHECK_CUDA(cudaStreamSynchronize(static_cast<cudaStream_t>(stream_)));
}

Graph::Graph(Stream& stream, const std::function<void()>& work) {
  const auto handle = static_cast<cudaStream_t>(stream.get());
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  CHECK_CUDA(cudaStreamBeginCapture(handle, cudaStreamCaptureModeGlobal));
  work();
  CHECK_CUDA(cudaStreamEndCapture(handle, &graph));
  CHECK_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  CHECK_CUDA(cudaGraphDestroy(graph));
  graph_ = executable;
}

Graph::~Graph() { static_cast<void>(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph_))); }

void Graph::replay(Stream& stream) {
  CHECK_CUDA(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph_),
                             static_cast<cudaStream_t>(stream.get())));
}

}  // namespace flash_mla::test
