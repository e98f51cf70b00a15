// Dense MLA decode on Hopper: one persistent launch that plans, attends and merges.
//
// Every CTA works on a tile of at most 64 query rows. It reads the lengths, finds its part of the
// work (core/schedule.h) and walks through it, item by item:
//   warpgroups 0, 1  the output, half of the columns each (output.cuh), then the epilogue
//                    (epilogue.cuh) and, for requests that were split, the merge (merge.cuh);
//   warpgroup 2      scores and softmax (score.cuh), ahead of them;
//   warp 12          the work items, and what of Q stays in shared memory, by TMA (producer.cuh);
//   warp 13          the rest of Q, and the right halves of the pages, by TMA (producer.cuh);
//   warps 14, 15     the left halves and the RoPE parts of the pages.
// With more than 64 rows two CTAs make a cluster: 64 rows each, and every page comes once, by
// multicast to both.
//
// Budgets and schedule: README.md. Sources: FlashAttention-3 (arXiv:2407.08608) for warp
// specialisation, Flash-Decoding for the split over the keys.
#pragma once

#include "cuda/sm90/decode_dense/memo.cuh"
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
  if (i < kRopeBuffers + kTurns) return kWarpgroup;  // p_ready, may_start
  i -= kRopeBuffers + kTurns;
  return i < kItems ? 1 : 3 * kWarps + 3;  // item_empty: warpgroups 0 to 2, who loads pages
}

// Who makes barrier `i`: of a buffer that begin() loads into, the warp that does, so that none
// waits for another one; else the query warp, which tells of the first item.
__device__ __forceinline__ int maker(int i) {
  const int buffer = i < kBuffers ? i : i - kBuffers;
  if (buffer < kLeftBuffers) return kLeftWarp;
  if (buffer < kHalfBuffers) return kRightWarp;
  return buffer < kQueryBuffer ? kRopeWarp : kQueryWarp;
}

// By each warp of the producers.
__device__ __forceinline__ void init_barriers(SharedStorage& shared, int cluster) {
  namespace p = ::cuda::ptx;
  static_assert(kBarriers <= 32);
  const int i = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (i < kBarriers && maker(i) == warp) {
    p::mbarrier_init(reinterpret_cast<uint64_t*>(&shared.barriers) + i, arrivals(i, cluster));
    p::fence_mbarrier_init(p::sem_release, p::scope_cluster);
    ptx::fence_proxy_async();
  }
  __syncwarp();
}

template <typename T>
__device__ __forceinline__ void put_out(const KernelParams& params, SharedStorage& shared) {
  Output<T> output(params, shared);
  Merger<T> merger{params, shared};
#pragma unroll 1
  for (Ring at(0, kItems);; at.advance()) {
    ptx::mbarrier_wait(&shared.barriers.item_full[at.slot()], at.phase());
    const WorkItem& item = shared.items[at.slot()];
    if (item.end) break;
    output.run(item);
    merger.put_out(item, output, at);
    __syncwarp();
    if (lane_index() == 0) ::cuda::ptx::mbarrier_arrive(&shared.barriers.item_empty[at.slot()]);
  }
  merger.finish();
}

// Before the roles, nothing but the barriers is published to other CTAs or roles (what thread 0
// sets, only output warps read, after they have met; what the query warp sets, who waited for its
// first item), and init_barriers() has its own fence: a
// releasing arrival would wait for every load on its way.
template <typename T, typename Semantics>
__device__ __forceinline__ void cluster_sync(Semantics semantics) {
  if constexpr (T::kMulticast) {
    ::cuda::ptx::barrier_cluster_arrive(semantics);
    ::cuda::ptx::barrier_cluster_wait();
  } else {
    __syncthreads();
  }
}

// Where this CTA's part starts, and with what: by each warp for itself, or, where requests are
// many, by all producers together. `seqlen`: of request `lane`, where they are few.
template <int kCluster>
__device__ __forceinline__ First plan(const KernelParams& params,
                                      const Position<kCluster>& position, int32_t seqlen,
                                      SharedStorage& shared) {
  const DecodeParams& decode = params.decode;
  Schedule schedule(params.schedule, 0);
  const int32_t max_len = max_seqlen(decode.max_pages);
  const Start start =
      decode.b > kFewRequests
          ? find_start<Producers>(decode.cache_seqlens, decode.b, max_len, params.schedule,
                                  position.part, schedule, shared.find_start)
          : find_start_of_few(seqlen, decode.b, max_len, params.schedule, position.part, schedule);
  First first = {};
  first.rules = {schedule.payload, schedule.whole_parts, schedule.shape.chunks,
                 kTileRows >> schedule.shape.level};
  first.walk = begin_walk(schedule, start, position.part);
  next_item(params, first.rules, position, first.walk, first.item);
  return first;
}

// What comes before all roles meet, up to the loads of the first page: a short decode waits for
// little else. Nothing here concerns the other CTA of a pair. By the producers; true where the
// first work item was found anew.
template <typename T>
__device__ __forceinline__ bool prepare(const KernelParams& params, const TensorMaps& maps,
                                        SharedStorage& shared) {
  const auto position = Position<T::kCluster>::here(params.schedule);
  if (threadIdx.x / 32 == kRopeWarp) prefetch(params, maps);
  Recollection memory(params);
  init_barriers(shared, T::kCluster);
  const bool holds = memory.holds();
  if (!holds) memory.first = plan(params, position, memory.seqlen(), shared);
  Producer<T>(params, maps, shared, position).begin(memory.first);
  return !holds;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    decode_dense_kernel(const __grid_constant__ KernelParams params,
                        const __grid_constant__ TensorMaps maps) {
  extern __shared__ __align__(1024) uint8_t raw[];
  SharedStorage& shared = *reinterpret_cast<SharedStorage*>(raw);
  bool is_new = false;
  if (threadIdx.x / kWarpgroup == kProducerWarpgroup) {
    is_new = prepare<T>(params, maps, shared);
  } else if (threadIdx.x == 0) {
    for (uint64_t& landed : shared.merge_landed) ::cuda::ptx::mbarrier_init(&landed, 1);
    ptx::fence_proxy_async();
    shared.num_split_tiles = 0;
  }
  cluster_sync<T>(::cuda::ptx::sem_relaxed);

  if (threadIdx.x < kOutputThreads) {
    ptx::increase_registers<kOutputRegisters>();
    put_out<T>(params, shared);
  } else if (threadIdx.x / kWarpgroup == kScoreWarpgroup) {
    Scorer<T>(params, shared).run();
  } else {
    ptx::decrease_registers<kProducerRegisters>();
    Producer<T> producer(params, maps, shared, Position<T::kCluster>::here(params.schedule));
    if (threadIdx.x / 32 != kQueryWarp) {
      producer.load_pages();
    } else {
      if (is_new) Recollection::write(params, shared.first);
      if (threadIdx.x == kQueryWarp * 32) producer.walk_items();
    }
  }
  cluster_sync<T>(::cuda::ptx::sem_release);  // the other CTA may still signal this one's barriers
}

}  // namespace flash_mla::cuda::decode_dense
