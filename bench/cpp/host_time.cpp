// Times the host side of the C++ calls: for how long decode() and plan_decode() keep the calling
// thread. As in an engine, memory, workspace and plan are made once, and every call enqueues one
// kernel. A figure is the median over batches of calls, with the device idle before each batch, so
// that no call waits for room in the stream. Prints one JSON object a shape; bench/run.py keeps
// them. Exits with 1 and a message where there is no Hopper GPU, a call fails or a result is wrong.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "flash_mla/flash_mla.h"

namespace {

using flash_mla::contiguous_view;
using flash_mla::DType;

constexpr flash_mla::Device kDevice = {flash_mla::DeviceType::kCuda, 0};
constexpr int kPageSize = 64, kTokens = 1024, kPages = kTokens / kPageSize;  // of each request
constexpr int kBatches = 21, kCalls = 50;

struct Shape {
  int b, h_q;
};
constexpr Shape kShapes[] = {{1, 16}, {1, 128}, {16, 16}, {16, 128}, {128, 16}, {128, 128}};

[[noreturn]] void fail(const char* what, const char* why) {
  std::fprintf(stderr, "host_time: %s: %s\n", what, why);
  std::exit(1);
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail(what, cudaGetErrorString(error));
}
void check(const flash_mla::Status& status, const char* what) {
  if (!status.ok()) fail(what, status.message());
}
#define CHECK(call) check(call, #call)

// Zeroed device memory.
class Buffer {
 public:
  explicit Buffer(std::size_t size) {
    CHECK(cudaMalloc(&data_, std::max<std::size_t>(size, 1)));
    CHECK(cudaMemset(data_, 0, size));
    CHECK(cudaDeviceSynchronize());  // the calls' stream does not wait for the default one
  }
  explicit Buffer(const std::vector<std::int32_t>& values) : Buffer(values.size() * 4) {
    CHECK(cudaMemcpy(data_, values.data(), values.size() * 4, cudaMemcpyHostToDevice));
  }
  ~Buffer() { static_cast<void>(cudaFree(data_)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  [[nodiscard]] void* get() const { return data_; }

 private:
  void* data_ = nullptr;
};

// Microseconds of one call: median over batches.
template <typename Call>
double host_us(const char* what, const Call& call) {
  std::vector<double> times;
  for (int batch = 0; batch <= kBatches; ++batch) {
    CHECK(cudaDeviceSynchronize());
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalls; ++i) check(call(), what);
    const std::chrono::duration<double, std::micro> spent =
        std::chrono::steady_clock::now() - start;
    if (batch > 0) times.push_back(spent.count() / kCalls);  // the first one warms up
  }
  CHECK(cudaDeviceSynchronize());
  std::sort(times.begin(), times.end());
  return times[kBatches / 2];
}

void measure(const Shape& shape, cudaStream_t stream) {
  const auto [b, h_q] = shape;
  const std::int64_t pages = std::int64_t{b} * kPages, rows = std::int64_t{b} * h_q;
  std::vector<std::int32_t> table(pages);
  std::iota(table.begin(), table.end(), 0);
  const Buffer q(rows * flash_mla::kHeadDimQk * 2), out(rows * flash_mla::kHeadDimV * 2);
  const Buffer kv_cache(pages * kPageSize * flash_mla::kHeadDimQk * 2), lse(rows * 4);
  const Buffer block_table(table), cache_seqlens(std::vector<std::int32_t>(b, kTokens));

  flash_mla::DecodeArgs args;
  args.q = contiguous_view(q.get(), DType::kBf16, kDevice, {b, 1, h_q, flash_mla::kHeadDimQk});
  args.kv_cache = contiguous_view(kv_cache.get(), DType::kBf16, kDevice,
                                  {pages, kPageSize, 1, flash_mla::kHeadDimQk});
  args.block_table = contiguous_view(block_table.get(), DType::kInt32, kDevice, {b, kPages});
  args.cache_seqlens = contiguous_view(cache_seqlens.get(), DType::kInt32, kDevice, {b});
  args.out = contiguous_view(out.get(), DType::kBf16, kDevice, {b, 1, h_q, flash_mla::kHeadDimV});
  args.lse = contiguous_view(lse.get(), DType::kFp32, kDevice, {b, h_q, 1});
  args.causal = true;

  flash_mla::Workspace workspace;
  CHECK(flash_mla::workspace_size(args, &workspace.counters_size, &workspace.partials_size));
  const Buffer counters(workspace.counters_size), partials(workspace.partials_size);
  workspace.counters = counters.get();
  workspace.partials = partials.get();
  CHECK(flash_mla::init_workspace(workspace, kDevice, stream));

  std::int32_t num_parts = 0;
  CHECK(flash_mla::plan_size(args, &num_parts));
  const Buffer metadata(std::size_t{4} * num_parts * flash_mla::kPlanRowInts);
  const Buffer num_splits(std::size_t{4} * (b + 1));
  const flash_mla::DecodePlan plan = {
      contiguous_view(metadata.get(), DType::kInt32, kDevice, {num_parts, flash_mla::kPlanRowInts}),
      contiguous_view(num_splits.get(), DType::kInt32, kDevice, {b + 1})};

  const double plan_us =
      host_us("plan_decode", [&] { return flash_mla::plan_decode(args, plan, stream); });
  const double decode_us =
      host_us("decode", [&] { return flash_mla::decode(args, &plan, workspace, stream); });

  // Every score is 0, so lse is the logarithm of the number of tokens.
  std::vector<float> got(rows);
  CHECK(cudaMemcpy(got.data(), lse.get(), got.size() * sizeof(float), cudaMemcpyDeviceToHost));
  for (const float value : got) {
    if (!(std::abs(value - std::log(float{kTokens})) < 1e-3f)) fail("decode", "wrong lse");
  }
  std::printf("{\"b\": %d, \"s_q\": 1, \"h_q\": %d, \"s_kv\": %d, ", b, h_q, kTokens);
  std::printf("\"decode_us\": %.2f, \"plan_decode_us\": %.2f}\n", decode_us, plan_us);
  std::fflush(stdout);
}

}  // namespace

int main() {
  flash_mla::CudaDeviceInfo info;
  const flash_mla::Status status = flash_mla::cuda_device_info(0, &info);
  if (!status.ok() || !info.supported) {
    fail("no Hopper GPU to run on", status.ok() ? info.why_not : status.message());
  }
  CHECK(cudaSetDevice(kDevice.index));
  cudaStream_t stream = nullptr;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (const Shape& shape : kShapes) measure(shape, stream);
  CHECK(cudaStreamDestroy(stream));
}
