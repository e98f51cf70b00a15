// The producer warpgroup: one warp walks the work items, tells everybody and brings Q's left half
// and RoPE part; another brings Q's right half and the pages. All by TMA.
#pragma once

#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/decode_dense/work.cuh"

namespace flash_mla::cuda::decode_dense {

// By the page warp: what it needs first is on its way while the work is found. Where requests are
// few, that may be any line of the block table.
__device__ __forceinline__ void prefetch(const KernelParams& params, const TensorMaps& maps) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) {
    ptx::prefetch_map(&maps.query);
    ptx::prefetch_map(&maps.half);
    ptx::prefetch_map(&maps.rope);
  }
  constexpr int kLinePages = 128 / sizeof(int32_t);
  const DecodeParams& decode = params.decode;
  const int row_lines = ceil_div(decode.max_pages, kLinePages);
  if (row_lines > 32 || decode.b > 32 || lane >= decode.b * row_lines) return;
  ptx::prefetch_line(decode.block_table + lane / row_lines * decode.stride_block_table_b +
                     lane % row_lines * kLinePages);
}

template <typename T>
class Producer {
 public:
  __device__ Producer(const KernelParams& params, const TensorMaps& maps, SharedStorage& shared,
                      Position<T::kCluster> position)
      : params_(params), maps_(maps), shared_(shared), position_(position) {}

  // The work items, by one thread.
  __device__ void walk_items(Walk walk) {
    Rings rings;
    Ring q(kQueryBuffer, 1);
    bool end = false;
    for (Ring at(0, kItems); !end; at.advance()) {
      ptx::mbarrier_wait(&shared_.barriers.item_empty[at.slot()], at.phase() ^ 1);
      WorkItem& item = shared_.items[at.slot()];
      next_item(params_, position_, walk, item);
      item.left = rings.left.position();
      item.right = rings.right.position();
      item.rope = rings.rope.position();
      item.query_phase = q.phase();
      end = item.end;
      ::cuda::ptx::mbarrier_arrive(&shared_.barriers.item_full[at.slot()]);
      if (end || item.pages == 0) continue;
      rings.left.advance(item.pages);
      rings.right.advance(item.pages + 1);
      rings.rope.advance(item.pages);
      uint64_t* full = begin_load(q, kHalfBytes + kTileBytes);
      load_query_tiles(item, 0, kHalfTiles, shared_.q_left, full);
      load_query_tiles(item, kRopeTile, 1, shared_.q_rope, full);
      q.advance();
    }
  }

  // Q's right half, then the pages, of every item in order. A pair of CTAs shares the load of a
  // page: CTA 0 sends the left half to both, CTA 1 the right half, and they take turns with the
  // RoPE part.
  __device__ void load_pages() {
    const int lane = threadIdx.x % 32;
    Rings rings;
    int turn = 0;
    for (Ring at(0, kItems);; at.advance()) {
      ptx::mbarrier_wait(&shared_.barriers.item_full[at.slot()], at.phase());
      const WorkItem& item = shared_.items[at.slot()];
      if (item.end) break;
      const int pages = item.pages;
      const int32_t* table = params_.decode.block_table +
                             item.request * params_.decode.stride_block_table_b +
                             item.first_token / kPageTokens;
      int pages_ahead = lane < pages ? __ldg(table + lane) : 0;
      if (pages > 0) {
        if (lane == 0) {
          uint64_t* full = begin_load(rings.right, kHalfBytes);
          load_query_tiles(item, kHalfTiles, kHalfTiles, shared_.half[rings.right.buffer()], full);
        }
        rings.right.advance();
      }
      for (int i = 0; i < pages; ++i) {
        if (i % 32 == 0 && i > 0) pages_ahead = i + lane < pages ? __ldg(table + i + lane) : 0;
        const int page = __shfl_sync(~0u, pages_ahead, i % 32);
        if (lane == 0) {
          load_half(rings.right, kHalfTiles, item.head, page, 1);
          load_half(rings.left, 0, item.head, page, 0);
          load_part(rings.rope, maps_.rope, shared_.rope[rings.rope.slot()], kTileBytes, kRopeTile,
                    item.head, page, turn);
        }
        rings.advance();
        turn ^= 1;
        __syncwarp();
      }
      __syncwarp();
      if (lane == 0) ::cuda::ptx::mbarrier_arrive(&shared_.barriers.item_empty[at.slot()]);
    }
  }

 private:
  const KernelParams& params_;
  const TensorMaps& maps_;
  SharedStorage& shared_;
  Position<T::kCluster> position_;

  // Waits until nobody reads the buffer any more, and announces `bytes`.
  __device__ uint64_t* begin_load(const Ring& at, int bytes) {
    namespace p = ::cuda::ptx;
    uint64_t* full = &shared_.barriers.full[at.buffer()];
    ptx::mbarrier_wait(&shared_.barriers.empty[at.buffer()], at.phase() ^ 1);
    p::mbarrier_arrive_expect_tx(p::sem_release, p::scope_cta, p::space_shared, full, bytes);
    return full;
  }

  __device__ void load_query_tiles(const WorkItem& item, int tile, int count, uint8_t* target,
                                   uint64_t* full) {
    for (int i = 0; i < count; ++i) {
      const int32_t at[5] = {0,
                             item.head * params_.heads_per_kv + item.first_row % params_.map_width,
                             item.first_row / params_.map_width, tile + i, item.request};
      ptx::load_box<false>(&maps_.query, target + i * kTileBytes, full, at, 0);
    }
  }

  __device__ void load_half(const Ring& at, int tile, int head, int page, int sender) {
    load_part(at, maps_.half, shared_.half[at.buffer()], kHalfBytes, tile, head, page, sender);
  }
  // `sender`: the CTA of the pair that issues the copy.
  __device__ void load_part(const Ring& at, const CUtensorMap& map, uint8_t* target, int bytes,
                            int tile, int head, int page, int sender) {
    uint64_t* full = begin_load(at, bytes);
    if (!T::kMulticast || position_.rank == sender) {
      const int32_t box[5] = {0, 0, tile, head, page};
      ptx::load_box<T::kMulticast>(&map, target, full, box, T::kClusterMask);
    }
  }
};

}  // namespace flash_mla::cuda::decode_dense
