// merge_states: partial attention results of the same queries over disjoint keys, merged by their
// log-sum-exp (Flash-Decoding).
//
// One warp a row (request, query, head). The lanes hold the parts' lse, two each, and turn them
// into weights exp(lse_p - max) / sum; then every lane sums its columns over the parts, eight at a
// time. A part that saw no key, or whose weight vanishes, is not read. `out` may be one of `outs`:
// a lane reads every part of a column before it writes it, and a warp every lse of its row.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/common/device_guard.h"
#include "cuda/common/error.h"
#include "cuda/cuda.h"

namespace flash_mla::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 8;  // a lane's columns at a time: 16 bytes of bf16
constexpr int kPartsInFlight = 4;
constexpr int kPartsPerLane = kMergePartsLimit / 32;
static_assert(kPartsPerLane == 2 && kMergePartsLimit % kPartsInFlight == 0);
constexpr std::uint32_t kAllLanes = 0xffffffff;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ void from_float(float x, float& out) { out = x; }
__device__ void from_float(float x, __half& out) { out = __float2half_rn(x); }
__device__ void from_float(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

// Eight consecutive elements; Chunk is the widest type their addresses are aligned for: uint4 or
// the element itself.
template <typename T, typename Chunk>
struct Columns {
  static constexpr int kChunks = kColumns * sizeof(T) / sizeof(Chunk);
  alignas(16) T value[kColumns];

  __device__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      reinterpret_cast<Chunk*>(value)[i] = reinterpret_cast<const Chunk*>(from)[i];
    }
  }
  __device__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      // NOTE: a plain assignment of a uint4 compiles to four 4-byte stores here (nvcc 13.0).
      __stwb(reinterpret_cast<Chunk*>(to) + i, reinterpret_cast<const Chunk*>(value)[i]);
    }
  }
};

__device__ float warp_max(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
}

__device__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}

template <typename T, typename Out, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    merge_states_kernel(const __grid_constant__ MergeStatesParams params) {
  using In = Columns<T, std::conditional_t<kAligned, uint4, T>>;
  using Result = Columns<Out, std::conditional_t<kAligned, uint4, Out>>;
  const int lane = threadIdx.x % 32;
  const std::int64_t row = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const std::int64_t request_rows = std::int64_t{params.s_q} * params.h_q;
  if (row >= params.b * request_rows) return;
  const std::int64_t b = row / request_rows;
  const std::int64_t s = (row - b * request_rows) / params.h_q;
  const std::int64_t h = row - b * request_rows - s * params.h_q;

  // A part without keys is marked by -inf; NaN passes through to the result.
  float weight[kPartsPerLane];
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPartsPerLane; ++i) {
    const int p = i * 32 + lane;
    weight[i] = -INFINITY;
    if (p < params.num_parts) {
      const auto& part = params.parts[p];
      const float lse =
          part.lse[b * part.stride_lse_b + h * part.stride_lse_h + s * part.stride_lse_s];
      if (!isinf(lse)) weight[i] = lse;
    }
    largest = fmaxf(largest, weight[i]);
  }
  largest = warp_max(largest);
  bool saw_key = false;
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kPartsPerLane; ++i) {
    const bool counts = !isinf(weight[i]);
    saw_key |= counts;
    weight[i] = counts ? expf(weight[i] - largest) : 0.f;
    sum += weight[i];
  }
  saw_key = __any_sync(kAllLanes, saw_key);
  sum = warp_sum(sum);
  const float scale = saw_key ? 1.f / sum : 0.f;
#pragma unroll
  for (int i = 0; i < kPartsPerLane; ++i) weight[i] *= scale;
  if (lane == 0) {
    params.lse[b * params.stride_lse_b + h * params.stride_lse_h + s * params.stride_lse_s] =
        saw_key ? largest + logf(sum) : params.empty_lse;
  }

  Out* out = static_cast<Out*>(params.out) + b * params.stride_out_b + s * params.stride_out_s +
             h * params.stride_out_h;
  for (int first = 0; first < params.d; first += 32 * kColumns) {  // all lanes take part: shuffles
    const int column = first + lane * kColumns;
    float total[kColumns] = {};
    for (int group = 0; group < params.num_parts; group += kPartsInFlight) {
      In in[kPartsInFlight];
      float in_weight[kPartsInFlight];
#pragma unroll
      for (int i = 0; i < kPartsInFlight; ++i) {
        const int p = group + i;  // past num_parts the weights are 0
        in_weight[i] = __shfl_sync(kAllLanes, p < 32 ? weight[0] : weight[1], p % 32);
        if (column >= params.d) in_weight[i] = 0.f;
        if (in_weight[i] == 0.f) continue;
        const auto& part = params.parts[p];
        in[i].load(static_cast<const T*>(part.out) + b * part.stride_out_b + s * part.stride_out_s +
                   h * part.stride_out_h + column);
      }
#pragma unroll
      for (int i = 0; i < kPartsInFlight; ++i) {
        if (in_weight[i] == 0.f) continue;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          total[j] += in_weight[i] * to_float(in[i].value[j]);
        }
      }
    }
    if (column < params.d) {
      Result result;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) from_float(total[i], result.value[i]);
      result.store(out + column);
    }
  }
}

bool fits_16_bytes(const MergeStatesParams& params) {
  const auto misaligned = [](const void* pointer, DType dtype, std::int64_t stride_b,
                             std::int64_t stride_s, std::int64_t stride_h) {
    const auto strides = static_cast<std::uint64_t>(stride_b | stride_s | stride_h);
    return (reinterpret_cast<std::uintptr_t>(pointer) |
            strides * static_cast<std::uint64_t>(dtype_size(dtype))) %
               16 !=
           0;
  };
  for (int p = 0; p < params.num_parts; ++p) {
    const auto& part = params.parts[p];
    if (misaligned(part.out, params.dtype, part.stride_out_b, part.stride_out_s,
                   part.stride_out_h)) {
      return false;
    }
  }
  return !misaligned(params.out, params.out_dtype, params.stride_out_b, params.stride_out_s,
                     params.stride_out_h);
}

using Kernel = void (*)(MergeStatesParams);

template <typename T>
Kernel choose_kernel(bool to_fp32, bool aligned) {
  if (to_fp32) {
    return aligned ? merge_states_kernel<T, float, true> : merge_states_kernel<T, float, false>;
  }
  return aligned ? merge_states_kernel<T, T, true> : merge_states_kernel<T, T, false>;
}

Kernel choose_kernel(const MergeStatesParams& params) {
  const bool to_fp32 = params.out_dtype == DType::kFp32;
  const bool aligned = fits_16_bytes(params);
  switch (params.dtype) {
    case DType::kBf16:
      return choose_kernel<__nv_bfloat16>(to_fp32, aligned);
    case DType::kFp16:
      return choose_kernel<__half>(to_fp32, aligned);
    default:
      return choose_kernel<float>(to_fp32, aligned);
  }
}

}  // namespace

Status merge_states(const MergeStatesParams& params, std::int32_t device,
                    StreamHandle stream) noexcept {
  const std::int64_t rows = std::int64_t{params.b} * params.s_q * params.h_q;
  if (rows == 0) return {};
  const std::int64_t ctas = (rows + kWarps - 1) / kWarps;
  if (ctas > INT32_MAX) {
    return Status::error(
        StatusCode::kInvalidArgument, "merge_states: b * s_q * h_q = %lld, wanted at most %lld",
        static_cast<long long>(rows), static_cast<long long>(std::int64_t{INT32_MAX} * kWarps));
  }
  const DeviceGuard guard(device);
  FLASH_MLA_RETURN_IF_ERROR(guard.status());

  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(static_cast<unsigned>(ctas));
  launch.blockDim = dim3(kThreads);
  launch.stream = static_cast<cudaStream_t>(stream);
  FLASH_MLA_RETURN_IF_CUDA_ERROR(cudaLaunchKernelEx(&launch, choose_kernel(params), params));
  return {};
}

}  // namespace flash_mla::cuda
