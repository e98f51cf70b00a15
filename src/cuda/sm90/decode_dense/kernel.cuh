// Dense MLA decode on Hopper: one persistent launch that plans, attends and merges.
//
// Every CTA works on 64 query rows. It reads the lengths, finds its part of the work
// (core/schedule.h) and walks through it, item by item: warpgroup 0, 1  scores, softmax and output,
// each of every other page and of half of the output's columns (consumer.cuh),
//                 then the epilogue (epilogue.cuh) and, for requests that were split, the merge
//                 (merge.cuh);
// warp 8          pages, by TMA, in three parts each; two buffers (producer.cuh);
// warp 9          Q of the next item, by TMA, as soon as the last scores of this one are done
// (producer.cuh). (producer.cuh). With more than 64 rows two CTAs make a cluster: 64 rows each, and
// every page comes once, by multicast to both.
//
// Budgets and schedule: README.md. Sources: FlashAttention-3 (arXiv:2407.08608) for warp
// specialisation, FlashMLA's deep dive of 2025-04-22 for the seesaw of two warpgroups,
// Flash-Decoding for the split over the keys.
#pragma once

#include "cuda/sm90/decode_dense/merge.cuh"
#include "cuda/sm90/decode_dense/producer.cuh"

namespace flash_mla::cuda::decode_dense {

__device__ __forceinline__ void init_barriers(SharedStorage& shared, int cluster) {
  namespace p = ::cuda::ptx;
  for (int buffer = 0; buffer < kPageBuffers; ++buffer) {
    for (int part = 0; part < kNumParts; ++part) {
      p::mbarrier_init(&shared.full[buffer][part], 1);
      p::mbarrier_init(&shared.empty[buffer][part],
                       kWarpgroup / 32 * cluster);  // the last reader's warps, of both CTAs
    }
  }
  p::mbarrier_init(&shared.q_full, 1);
  p::mbarrier_init(&shared.q_empty, kConsumers / 32);
  p::fence_mbarrier_init(p::sem_release, p::scope_cluster);
}

template <typename T>
__device__ __forceinline__ void consume(const KernelParams& params, SharedStorage& shared) {
  Consumer<T> consumer(params, shared);
  Merger<T> merger{params, shared};
  for (;; consumer.phases ^= 2) {
    const uint32_t parity = consumer.phases >> 1;
    ptx::mbarrier_wait(&shared.q_full, parity);
    const WorkItem& item = shared.items[parity];
    if (item.end) break;
    if (threadIdx.x < kWarpgroup) {
      consumer.template run<0>(item);
    } else {
      consumer.template run<1>(item);
    }
    Epilogue<T>{consumer, params, shared}.run(item, parity);
    if (item.piece_count > 1) merger.arrive(item);
  }
  merger.finish();
}

template <typename T>
__device__ __forceinline__ void cluster_sync() {
  if constexpr (T::kMulticast) {
    ::cuda::ptx::barrier_cluster_arrive();
    ::cuda::ptx::barrier_cluster_wait();
  } else {
    __syncthreads();
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    decode_dense_kernel(const __grid_constant__ KernelParams params,
                        const __grid_constant__ TensorMaps maps) {
  extern __shared__ __align__(1024) uint8_t raw[];
  SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
  const auto position = Position<T::kCluster>::here(params.schedule);
  if (threadIdx.x == kConsumers) {
    ptx::prefetch_map(&maps.query);
    ptx::prefetch_map(&maps.half);
    ptx::prefetch_map(&maps.rope);
  }
  if (threadIdx.x == 0) {
    init_barriers(shared, T::kCluster);
    shared.num_split_tiles = 0;
  }
  Schedule schedule(params.schedule, 0);
  const Start start = find_start<kThreads>(params.decode.cache_seqlens, params.decode.b,
                                           max_seqlen(params.decode.max_pages), params.schedule,
                                           position.part, schedule, shared.find_start);
  const Walk walk = begin_walk(schedule, start, position.part);
  cluster_sync<T>();

  if (threadIdx.x < kConsumers) {
    ptx::increase_registers<kConsumerRegisters>();
    consume<T>(params, shared);
  } else {
    ptx::decrease_registers<kProducerRegisters>();
    Producer<T> producer{params, maps, shared, position};
    if (threadIdx.x / 32 == kPageWarp) {
      producer.load_pages(walk);
    } else if (threadIdx.x / 32 == kQueryWarp) {
      producer.load_queries(walk);
    }
  }
  cluster_sync<T>();  // the other CTA may still signal this one's barriers
}

}  // namespace flash_mla::cuda::decode_dense
