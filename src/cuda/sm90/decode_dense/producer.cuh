// The producer warpgroup: one warp brings pages, another Q and the description of the work, both by
// TMA. work.
#pragma once

#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/decode_dense/work.cuh"

namespace flash_mla::cuda::decode_dense {

template <typename T>
struct Producer {
  const KernelParams& params;
  const TensorMaps& maps;
  SharedStorage& shared;
  Position<T::kCluster> position;

  // The pages of every item, in order: even ones to buffer 0, odd ones to buffer 1. A pair of CTAs
  // shares the load: CTA 0 sends the left half to both, CTA 1 the right half, and they take turns
  // with the RoPE part.
  __device__ void load_pages(Walk walk) {
    const int lane = threadIdx.x % 32;
    uint32_t uses[kPageBuffers] = {0, 0};
    WorkItem item;
    for (next_item(params, position, walk, item); !item.end;
         next_item(params, position, walk, item)) {
      const int32_t* table = params.decode.block_table +
                             item.request * params.decode.stride_block_table_b +
                             item.first_token / kPageTokens;
      int pages_ahead = 0;
      for (int i = 0; i < item.pages; ++i) {
        if (i % 32 == 0) pages_ahead = i + lane < item.pages ? __ldg(table + i + lane) : 0;
        const int page = __shfl_sync(~0u, pages_ahead, i % 32);
        if (lane == 0) {
          if (i & 1)
            load_page<1>(page, item.head, uses[1]++);
          else
            load_page<0>(page, item.head, uses[0]++);
        }
        __syncwarp();
      }
    }
  }

  // Q's rows of each item, and the item itself, by one thread. A warp of its own, so that the next
  // item's Q need not wait behind its pages, nor they behind it.
  __device__ void load_queries(Walk walk) {
    namespace p = ::cuda::ptx;
    if (threadIdx.x % 32 != 0) return;
    for (uint32_t use = 0;; ++use) {
      ptx::mbarrier_wait(&shared.q_empty, (use & 1) ^ 1);
      WorkItem& item = shared.items[use & 1];
      next_item(params, position, walk, item);
      if (item.end) break;
      p::mbarrier_arrive_expect_tx(p::sem_release, p::scope_cta, p::space_shared, &shared.q_full,
                                   kPageBytes);
      const int32_t at[5] = {0, item.head * params.heads_per_kv + item.first_row % params.map_width,
                             item.first_row / params.map_width, 0, item.request};
      ptx::load_box<false>(&maps.query, shared.q, &shared.q_full, at, 0);
    }
    p::mbarrier_arrive(&shared.q_full);
  }

 private:
  template <int kBuffer>
  __device__ void load_page(int page, int head, uint32_t use) {
    uint8_t* buffer = shared.page[kBuffer];
    load_part<kBuffer, kLeft>(maps.half, buffer, kHalfBytes, 0, head, page, use, 0);
    load_part<kBuffer, kRight>(maps.half, buffer + kHalfBytes, kHalfBytes, kHalfTiles, head, page,
                               use, 1);
    load_part<kBuffer, kRope>(maps.rope, buffer + kRopeOffset, kTileBytes, 2 * kHalfTiles, head,
                              page, use, kBuffer);
  }

  // `sender`: the CTA of the pair that issues the copy.
  template <int kBuffer, Part kPart>
  __device__ void load_part(const CUtensorMap& map, uint8_t* destination, int bytes, int tile,
                            int head, int page, uint32_t use, int sender) {
    namespace p = ::cuda::ptx;
    uint64_t* full = &shared.full[kBuffer][kPart];
    ptx::mbarrier_wait(&shared.empty[kBuffer][kPart], (use & 1) ^ 1);
    p::mbarrier_arrive_expect_tx(p::sem_release, p::scope_cta, p::space_shared, full, bytes);
    if (!T::kMulticast || position.rank == sender) {
      const int32_t at[5] = {0, 0, tile, head, page};
      ptx::load_box<T::kMulticast>(&map, destination, full, at, T::kClusterMask);
    }
  }
};

}  // namespace flash_mla::cuda::decode_dense
