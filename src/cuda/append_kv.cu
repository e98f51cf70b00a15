// append_kv: copies new tokens' latent and RoPE parts into their rows of the paged cache.
//
// A slot that occurs twice must keep one of its rows whole, so two warps may never write to the
// same row. Hence every warp reads the whole slot mapping and does the tokens whose slot hashes to
// it, in order: the last row wins, and reruns are bitwise equal. The mapping is small (8 bytes a
// token against 2,304 copied) and comes from L2.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/common/device_guard.h"
#include "cuda/common/error.h"
#include "cuda/common/properties.h"
#include "cuda/cuda.h"

namespace flash_mla::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kCtasPerSm = 2;
constexpr int kTokensPerCta = 2;  // several warps a token, so that few tokens share a warp
constexpr int kLatent = kHeadDimV;
constexpr int kRope = kHeadDimQk - kHeadDimV;
constexpr int kElementBytes = 2;
constexpr std::uint32_t kAllLanes = 0xffffffff;

// One warp copies a row. Element has 16 bytes, or 2 where an address or stride does not allow it.
template <typename Element>
__device__ void copy_row(const AppendKvParams& params, std::int64_t token, std::int64_t slot,
                         int lane) {
  constexpr int kWidth = sizeof(Element) / kElementBytes;
  constexpr int kLatentElements = kLatent / kWidth;
  constexpr int kRopeElements = kRope / kWidth;
  const std::int64_t page = slot / params.page_size;
  const std::int64_t row = slot - page * params.page_size;
  auto* to = reinterpret_cast<Element*>(static_cast<std::uint16_t*>(params.kv_cache) +
                                        page * params.stride_kv_page + row * params.stride_kv_row);
  const auto* latent = reinterpret_cast<const Element*>(
      static_cast<const std::uint16_t*>(params.kv_c) + token * params.stride_kv_c_t);
  const auto* rope = reinterpret_cast<const Element*>(
      static_cast<const std::uint16_t*>(params.k_pe) + token * params.stride_k_pe_t);
  constexpr int kLatentPerLane = kLatentElements / 32;
  constexpr int kRopePerLane = (kRopeElements + 31) / 32;
  Element latent_part[kLatentPerLane];
  Element rope_part[kRopePerLane];
#pragma unroll
  for (int i = 0; i < kLatentPerLane; ++i) latent_part[i] = latent[i * 32 + lane];
#pragma unroll
  for (int i = 0; i < kRopePerLane; ++i) {
    if (i * 32 + lane < kRopeElements) rope_part[i] = rope[i * 32 + lane];
  }
#pragma unroll
  for (int i = 0; i < kLatentPerLane; ++i) to[i * 32 + lane] = latent_part[i];
#pragma unroll
  for (int i = 0; i < kRopePerLane; ++i) {
    if (i * 32 + lane < kRopeElements) to[kLatentElements + i * 32 + lane] = rope_part[i];
  }
}

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    append_kv_kernel(const __grid_constant__ AppendKvParams params) {
  constexpr int kRows = 4;  // loads of the mapping in flight
  const int lane = threadIdx.x % 32;
  const std::uint32_t warp = blockIdx.x * kWarps + threadIdx.x / 32;
  const std::uint32_t num_warps = gridDim.x * kWarps;
  const std::int64_t num_slots = params.num_pages * params.page_size;

  for (std::int64_t first = 0; first < params.t; first += kRows * 32) {
    std::int64_t slots[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const std::int64_t token = first + row * 32 + lane;
      slots[row] = token < params.t ? params.slot_mapping[token] : -1;
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const std::int64_t slot = slots[row];
      // Fibonacci hashing: neighbouring slots go to warps far apart.
      const std::uint32_t owner =
          __umulhi(static_cast<std::uint32_t>(slot) * 2654435769u, num_warps);
      std::uint32_t mine = __ballot_sync(kAllLanes, slot >= 0 && slot < num_slots && owner == warp);
      while (mine != 0) {
        const int source = __ffs(static_cast<int>(mine)) - 1;
        mine &= mine - 1;
        copy_row<Element>(params, first + row * 32 + source, __shfl_sync(kAllLanes, slot, source),
                          lane);
      }
    }
  }
}

bool fits_16_bytes(const AppendKvParams& params) {
  const auto address = [](const void* pointer) {
    return static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(pointer));
  };
  const auto bytes = [](std::int64_t stride) {
    return static_cast<std::uint64_t>(stride) * kElementBytes;
  };
  const std::uint64_t all = address(params.kv_c) | address(params.k_pe) | address(params.kv_cache) |
                            bytes(params.stride_kv_c_t) | bytes(params.stride_k_pe_t) |
                            bytes(params.stride_kv_page) | bytes(params.stride_kv_row);
  return all % 16 == 0;
}

}  // namespace

Status append_kv(const AppendKvParams& params, std::int32_t device, StreamHandle stream) noexcept {
  if (params.t == 0) return {};
  const DeviceGuard guard(device);
  FLASH_MLA_RETURN_IF_ERROR(guard.status());
  const DeviceProperties* properties = nullptr;
  FLASH_MLA_RETURN_IF_ERROR(device_properties(device, &properties));

  const std::int64_t wanted_ctas = (params.t + kTokensPerCta - 1) / kTokensPerCta;
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(static_cast<unsigned>(
      std::min<std::int64_t>(wanted_ctas, std::int64_t{kCtasPerSm} * properties->num_sms)));
  launch.blockDim = dim3(kThreads);
  launch.stream = static_cast<cudaStream_t>(stream);
  const auto kernel =
      fits_16_bytes(params) ? append_kv_kernel<uint4> : append_kv_kernel<std::uint16_t>;
  FLASH_MLA_RETURN_IF_CUDA_ERROR(cudaLaunchKernelEx(&launch, kernel, params));
  return {};
}

}  // namespace flash_mla::cuda
