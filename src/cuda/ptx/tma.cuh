// Tensor copies (TMA) of a paged cache's boxes into shared memory, alone or multicast to both CTAs
// of a pair.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/sync.cuh"

namespace flash_mla::cuda::ptx {

// Brings a tensor map, a kernel parameter, near before its first use.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Brings a line of global memory into L2.
__device__ __forceinline__ void prefetch_line(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global) : "memory");
}

// The box at `at` lands at `shared` (in each CTA of `mask` at the same place), and its bytes are
// counted on `barrier` there. Coordinates outside the tensor read as zeros.
template <bool kMulticast>
__device__ __forceinline__ void load_box(const CUtensorMap* map, void* shared, uint64_t* barrier,
                                         const int32_t (&at)[5], uint16_t mask) {
  namespace p = ::cuda::ptx;
  if constexpr (kMulticast) {
    p::cp_async_bulk_tensor(p::space_cluster, p::space_global, shared, map, at, barrier, mask);
  } else {
    p::cp_async_bulk_tensor(p::space_cluster, p::space_global, shared, map, at, barrier);
  }
}

}  // namespace flash_mla::cuda::ptx
