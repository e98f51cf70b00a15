// Dense MLA decode on Hopper: one persistent launch that plans, attends and merges.
//
// Every CTA works on 64 query rows. It reads the lengths, finds its part of the work
// (core/schedule.h) and walks through it, item by item:
//   warpgroups 0, 1  the output, half of the columns each (output.cuh), then the epilogue
//                    (epilogue.cuh) and, for requests that were split, the merge (merge.cuh);
//   warpgroup 2      scores and softmax (score.cuh), ahead of them;
//   warp 12          the pages and Q's right half, by TMA (producer.cuh);
//   warp 13          the work items, and the rest of Q (producer.cuh).
// With more than 64 rows two CTAs make a cluster: 64 rows each, and every page comes once, by
// multicast to both.
//
// Budgets and schedule: README.md. Sources: FlashAttention-3 (arXiv:2407.08608) for warp
// specialisation, Flash-Decoding for the split over the keys.
#pragma once

#include "cuda/sm90/decode_dense/merge.cuh"
#include "cuda/sm90/decode_dense/producer.cuh"

namespace flash_mla::cuda::decode_dense {

// Arrivals that complete a phase of barrier `i` of Barriers.
__device__ __forceinline__ int arrivals(int i, int cluster) {
  constexpr int kWarps = kWarpgroup / 32;
  i -= kBuffers;
  if (i < 0) return 1;  // full: who announces the bytes
  // The last readers' warps, of both CTAs; Q's are of this one.
  if (i < kHalfBuffers) return kWarps * cluster;
  if (i < kQueryBuffer) return 2 * kWarps * cluster;
  if (i < kBuffers) return kWarps;
  i -= kBuffers;
  if (i < 2 * kRopeBuffers + 1) return kWarpgroup;  // p_ready, left_issued
  i -= 2 * kRopeBuffers + 1;
  return i < kItems ? 1 : 3 * kWarps + 1;  // item_empty: warpgroups 0 to 2, page warp
}

// By one warpgroup.
__device__ __forceinline__ void init_barriers(SharedStorage& shared, int cluster) {
  namespace p = ::cuda::ptx;
  const int i = threadIdx.x % kWarpgroup;
  static_assert(kBarriers <= kWarpgroup);
  if (i < kBarriers) {
    p::mbarrier_init(reinterpret_cast<uint64_t*>(&shared.barriers) + i, arrivals(i, cluster));
    p::fence_mbarrier_init(p::sem_release, p::scope_cluster);
  }
}

template <typename T>
__device__ __forceinline__ void put_out(const KernelParams& params, SharedStorage& shared) {
  Output<T> output(params, shared);
  Merger<T> merger{params, shared};
  for (Ring at(0, kItems);; at.advance()) {
    ptx::mbarrier_wait(&shared.barriers.item_full[at.slot()], at.phase());
    const WorkItem& item = shared.items[at.slot()];
    if (item.end) break;
    output.run(item);
    merger.put_out(item, output);
    __syncwarp();
    if (lane_index() == 0) ::cuda::ptx::mbarrier_arrive(&shared.barriers.item_empty[at.slot()]);
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

// Where this CTA's part starts. By warp kQueryWarp, or, where requests are many, by all producers.
template <typename Team>
__device__ __forceinline__ Walk plan(const KernelParams& params, int part,
                                     FindStartScratch<Team>& scratch) {
  Schedule schedule(params.schedule, 0);
  const Start start = find_start<Team>(params.decode.cache_seqlens, params.decode.b,
                                       max_seqlen(params.decode.max_pages), params.schedule, part,
                                       schedule, scratch);
  return begin_walk(params.schedule, schedule, start, part);
}

// What comes before all roles meet, the lengths first: a short decode waits for little else.
template <typename T>
__device__ __forceinline__ Walk prepare(const KernelParams& params, const TensorMaps& maps,
                                        SharedStorage& shared) {
  const int warp = threadIdx.x / 32, warpgroup = threadIdx.x / kWarpgroup;
  Walk walk = {};
  if (warpgroup == kProducerWarpgroup) {
    const int part = Position<T::kCluster>::here(params.schedule).part;
    if (warp == kPageWarp) prefetch(params, maps);
    if (params.decode.b > kOneWarpRequests) {
      walk = plan<Producers>(params, part, shared.find_start.producers);
    } else if (warp == kQueryWarp) {
      walk = plan<OneWarp>(params, part, shared.find_start.warp);
    }
  } else if (warpgroup == kScoreWarpgroup) {
    init_barriers(shared, T::kCluster);
  } else if (threadIdx.x == 0) {
    shared.num_split_tiles = 0;
  }
  return walk;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    decode_dense_kernel(const __grid_constant__ KernelParams params,
                        const __grid_constant__ TensorMaps maps) {
  extern __shared__ __align__(1024) uint8_t raw[];
  SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
  const Walk walk = prepare<T>(params, maps, shared);
  cluster_sync<T>();

  if (threadIdx.x < kOutputThreads) {
    ptx::increase_registers<kOutputRegisters>();
    put_out<T>(params, shared);
  } else if (threadIdx.x / kWarpgroup == kScoreWarpgroup) {
    Scorer<T>(params, shared).run();
  } else {
    ptx::decrease_registers<kProducerRegisters>();
    Producer<T> producer(params, maps, shared, Position<T::kCluster>::here(params.schedule));
    if (threadIdx.x / 32 == kPageWarp) {
      producer.load_pages();
    } else if (threadIdx.x == kQueryWarp * 32) {
      producer.walk_items(walk);
    }
  }
  cluster_sync<T>();  // the other CTA may still signal this one's barriers
}

}  // namespace flash_mla::cuda::decode_dense
