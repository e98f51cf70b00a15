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

// Brings `bytes`, a multiple of 16, from a multiple of 16 on into L2.
__device__ __forceinline__ void prefetch_bulk(const void* global, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
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

// The same of what will not be read again soon: in L2 it makes room first.
template <bool kMulticast>
__device__ __forceinline__ void stream_box(const CUtensorMap* map, void* shared, uint64_t* barrier,
                                           const int32_t (&at)[5], uint16_t mask) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  if constexpr (kMulticast) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8, %9;" ::"r"(
            shared_address(shared)),
        "l"(map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]),
        "r"(shared_address(barrier)), "h"(mask), "l"(policy)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(shared_address(shared)),
        "l"(map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]),
        "r"(shared_address(barrier)), "l"(policy)
        : "memory");
  }
}

}  // namespace flash_mla::cuda::ptx
