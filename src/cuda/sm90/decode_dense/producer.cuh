// The producer warpgroup: one warp brings pages by TMA, three bring Q and the description of the
// work.
#pragma once

#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/decode_dense/work.cuh"

namespace flash_mla::cuda::decode_dense {

template <typename T>
struct Producer {
  const KernelParams& params;
  const CUtensorMap& half_map;  // boxes of four tiles
  const CUtensorMap& rope_map;  // boxes of one tile
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

  // Q's rows of each item, swizzled as nine tiles of 64 x 64, rows past the last one zero; and the
  // item itself. One thread walks through shared memory, which leaves the registers to the copies.
  __device__ void load_queries() {
    for (uint32_t use = 0;; ++use) {
      ptx::mbarrier_wait(&shared.q_empty, (use & 1) ^ 1);
      WorkItem& item = shared.items[use & 1];
      if (threadIdx.x == kQueryLeader) next_item(params, position, shared.query_walk, item);
      ptx::named_barrier_sync(kQueryWarpsMeet, kQueryWarps * 32);
      if (!item.end) {
        copy_rows(item);
        ptx::copy_async_wait_all();
        ptx::fence_proxy_async();
      }
      ::cuda::ptx::mbarrier_arrive(&shared.q_full);
      if (item.end) return;
    }
  }

 private:
  template <int kBuffer>
  __device__ void load_page(int page, int head, uint32_t use) {
    uint8_t* buffer = shared.page[kBuffer];
    load_part<kBuffer, kLeft>(half_map, buffer, kHalfBytes, 0, head, page, use, 0);
    load_part<kBuffer, kRight>(half_map, buffer + kHalfBytes, kHalfBytes, kHalfTiles, head, page,
                               use, 1);
    load_part<kBuffer, kRope>(rope_map, buffer + kRopeOffset, kTileBytes, 2 * kHalfTiles, head,
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
      ptx::load_box<T::kMulticast>(&map, destination, full, tile, head, page, T::kClusterMask);
    }
  }

  __device__ void copy_rows(const WorkItem& item) {
    const int warp = threadIdx.x / 32 - kPageWarp - 1, lane = threadIdx.x % 32;
    using Element = typename T::Element;
    constexpr int kChunksPerRow = kHeadDimQk / 8;
    const DecodeParams& decode = params.decode;
    const Element* base = static_cast<const Element*>(decode.q) + item.request * decode.stride_q_b +
                          static_cast<int64_t>(item.head) * params.heads_per_kv * decode.stride_q_h;
    const uint32_t q = ptx::shared_address(shared.q);
    int s = (item.first_row + warp) / params.heads_per_kv;
    int head = (item.first_row + warp) % params.heads_per_kv;
    for (int row = warp; row < kTileRows; row += kQueryWarps) {
      const bool valid = row < item.rows;
      const Element* source =
          valid ? base + s * decode.stride_q_s + head * decode.stride_q_h : base;
#pragma unroll
      for (int chunk = lane; chunk < kChunksPerRow; chunk += 32) {
        const uint32_t target =
            q + chunk / 8 * kTileBytes + row * 128 + (((chunk % 8) ^ (row % 8)) << 4);
        ptx::copy16_async(target, source + chunk * 8, valid);
      }
      for (head += kQueryWarps; head >= params.heads_per_kv; head -= params.heads_per_kv) ++s;
    }
  }
};

}  // namespace flash_mla::cuda::decode_dense
