// Launches one instantiation of the dense decode kernel.
#pragma once

#include <atomic>

#include "cuda/common/error.h"
#include "cuda/common/properties.h"
#include "cuda/sm90/decode_dense/kernel.cuh"
#include "cuda/sm90/decode_dense/launch.h"

namespace flash_mla::cuda::decode_dense {

template <typename T>
Status launch(const KernelParams& params, const TensorMaps& maps, int32_t ctas, int32_t device,
              cudaStream_t stream) noexcept {
  const auto kernel = decode_dense_kernel<T>;
  // Once per device: it costs host time.
  static std::atomic<bool> attribute_is_set[kMaxDevices];
  if (!attribute_is_set[device].load(std::memory_order_relaxed)) {
    FLASH_MLA_RETURN_IF_CUDA_ERROR(cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(SharedStorage)));
    attribute_is_set[device].store(true, std::memory_order_relaxed);
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {T::kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = sizeof(SharedStorage);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  FLASH_MLA_RETURN_IF_CUDA_ERROR(cudaLaunchKernelEx(&config, kernel, params, maps));
  return {};
}

}  // namespace flash_mla::cuda::decode_dense
