// validate_decode: the opt-in check of what only the device knows, lengths and page numbers.
//
// One warp a request looks at its length and at the table entries the length makes use of;
// atomicMin keeps the first offender of each kind, so that the message does not depend on timing.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/common/device_guard.h"
#include "cuda/common/error.h"
#include "cuda/common/host.h"
#include "cuda/cuda.h"

namespace flash_mla::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr std::int64_t kMaxCtas = 1024;

// First offenders, all bits set where there is none; a page number's is (request << 32) + column.
struct Report {
  unsigned long long length;
  unsigned long long page;
};
constexpr unsigned long long kNone = ~0ULL;

struct ValidateArgs {
  const std::int32_t* cache_seqlens;  // [b]
  const std::int32_t* block_table;    // [b, max_pages]
  std::int64_t stride_block_table_b;
  std::int64_t max_len;
  std::int32_t b;
  std::int32_t page_size;
  std::int32_t num_pages;
  Report* report;
};

__global__ void __launch_bounds__(kThreads)
    validate_kernel(const __grid_constant__ ValidateArgs args) {
  const int lane = threadIdx.x % 32;
  for (std::int64_t request = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
       request < args.b; request += std::int64_t{gridDim.x} * kWarps) {
    const std::int64_t seqlen = args.cache_seqlens[request];
    if (seqlen < 0 || seqlen > args.max_len) {
      if (lane == 0) atomicMin(&args.report->length, static_cast<unsigned long long>(request));
      continue;
    }
    const std::int64_t pages = (seqlen + args.page_size - 1) / args.page_size;
    const std::int32_t* table = args.block_table + request * args.stride_block_table_b;
    for (std::int64_t column = lane; column < pages; column += 32) {
      const std::int32_t page = table[column];
      if (page < 0 || page >= args.num_pages) {
        atomicMin(&args.report->page, static_cast<unsigned long long>((request << 32) + column));
        break;  // this lane's later columns cannot be the first
      }
    }
  }
}

// Copies one value back and waits for it.
template <typename T>
Status copy_to_host(const T* from, T* to, cudaStream_t stream) noexcept {
  FLASH_MLA_RETURN_IF_CUDA_ERROR(
      cudaMemcpyAsync(to, from, sizeof(T), cudaMemcpyDeviceToHost, stream));
  FLASH_MLA_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream));
  return {};
}

}  // namespace

Status validate_decode(const DecodeParams& params, const Workspace& workspace, std::int32_t device,
                       StreamHandle stream_handle) noexcept {
  const DeviceGuard guard(device);
  FLASH_MLA_RETURN_IF_ERROR(guard.status());
  if (is_capturing(stream_handle, nullptr)) {
    return Status::error(
        StatusCode::kInvalidArgument,
        "decode: validate = true, wanted false while the stream is being captured; "
        "the check synchronises");
  }
  if (workspace.partials == nullptr || workspace.partials_size < sizeof(Report)) {
    return Status::error(StatusCode::kInvalidArgument,
                         "decode: workspace.partials_size = %zu, wanted at least %zu with validate",
                         workspace.partials == nullptr ? 0 : workspace.partials_size,
                         sizeof(Report));
  }
  if (params.b == 0) return {};

  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const std::int64_t max_len = std::int64_t{params.max_pages} * params.page_size;
  auto* report = static_cast<Report*>(workspace.partials);
  const ValidateArgs args{.cache_seqlens = params.cache_seqlens,
                          .block_table = params.block_table,
                          .stride_block_table_b = params.stride_block_table_b,
                          .max_len = max_len,
                          .b = params.b,
                          .page_size = params.page_size,
                          .num_pages = params.num_pages,
                          .report = report};
  FLASH_MLA_RETURN_IF_CUDA_ERROR(cudaMemsetAsync(report, 0xff, sizeof(Report), stream));
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(static_cast<unsigned>(
      std::min<std::int64_t>((std::int64_t{params.b} + kWarps - 1) / kWarps, kMaxCtas)));
  launch.blockDim = dim3(kThreads);
  launch.stream = stream;
  FLASH_MLA_RETURN_IF_CUDA_ERROR(cudaLaunchKernelEx(&launch, validate_kernel, args));
  Report found{};
  FLASH_MLA_RETURN_IF_ERROR(copy_to_host(report, &found, stream));

  std::int32_t value = 0;
  if (found.length != kNone) {
    FLASH_MLA_RETURN_IF_ERROR(copy_to_host(params.cache_seqlens + found.length, &value, stream));
    return Status::error(
        StatusCode::kInvalidArgument,
        "decode: cache_seqlens[%llu] = %d, wanted 0 .. %lld (max_pages * page_size)", found.length,
        value, static_cast<long long>(max_len));
  }
  if (found.page != kNone) {
    const unsigned long long request = found.page >> 32;
    const unsigned long long column = found.page & 0xffffffff;
    FLASH_MLA_RETURN_IF_ERROR(
        copy_to_host(params.block_table +
                         static_cast<std::int64_t>(request) * params.stride_block_table_b + column,
                     &value, stream));
    return Status::error(StatusCode::kInvalidArgument,
                         "decode: block_table[%llu, %llu] = %d, wanted 0 .. num_pages - 1 = %d",
                         request, column, value, params.num_pages - 1);
  }
  return {};
}

}  // namespace flash_mla::cuda
