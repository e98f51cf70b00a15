// The producer warpgroup: one warp walks the work items, tells everybody and brings what of Q stays
// in shared memory; the others bring the pages, a kind of buffer each, so that none waits for
// another kind's, and one of them what of Q goes to registers. All by TMA. Before the roles begin,
// they have asked for the first item's Q and its first page.
#pragma once

#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/decode_dense/work.cuh"

namespace flash_mla::cuda::decode_dense {

// By one warp: what is needed first is on its way while the work is found. Where requests are few,
// that may be any line of the block table.
__device__ __forceinline__ void prefetch(const KernelParams& params, const TensorMaps& maps) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) {
    ptx::prefetch_line(params.decode.cache_seqlens);
    ptx::prefetch_map(&maps.query_half);
    ptx::prefetch_map(&maps.query_rope);
    ptx::prefetch_map(&maps.half);
    ptx::prefetch_map(&maps.rope);
  }
  constexpr int kLinePages = 128 / sizeof(int32_t);
  const DecodeParams& decode = params.decode;
  const int64_t pages = (decode.b - 1) * decode.stride_block_table_b + decode.max_pages;
  if (decode.max_pages > 0 && pages <= 32 * kLinePages && lane * kLinePages < pages) {
    ptx::prefetch_line(decode.block_table + lane * kLinePages);
  }
}

template <typename T>
class Producer {
 public:
  __device__ Producer(const KernelParams& params, const TensorMaps& maps, SharedStorage& shared,
                      Position<T::kCluster> position)
      : params_(params), maps_(maps), shared_(shared), position_(position) {}

  // The first work item, before the roles begin, by all four warps: what it needs is on its way
  // while the CTA, and its pair, get ready.
  __device__ __forceinline__ void begin(const First& first) {
    const int warp = threadIdx.x / 32;
    const WorkItem& item = first.item;
    if (threadIdx.x % 32 != 0) {
      // Lane 0 does it.
    } else if (warp == kQueryWarp) {
      if (item.pages > 0) load_query(item, Ring(kQueryBuffer, 1));
      shared_.first = first;
      shared_.items[0] = item;
      ::cuda::ptx::mbarrier_arrive(&shared_.barriers.item_full[0]);
    } else if (item.pages > 0) {
      Part part = part_of(warp);
      if (warp == kRightWarp) {
        load_right_query(item, Rings().right);
        part.ring.advance();
      }
      // Another cluster may want the page too, if not at the same moment.
      const bool stream = first.rules.payload <= T::kStreamedPages && first.rules.chunks == 1 &&
                          params_.schedule.team == 1;
      load<false>(part, item.head, __ldg(table_of(item)), stream);
    }
    __syncwarp();  // all lanes of the query warp may read shared_.first
  }

  // The other work items, by one thread.
  __device__ void walk_items() {
    const Rules& rules = shared_.first.rules;
    Walk walk = shared_.first.walk;
    Rings rings;
    Ring at(0, kItems), q(kQueryBuffer, 1);
    while (true) {
      const WorkItem& item = shared_.items[at.slot()];
      if (item.end) break;
      if (item.pages > 0) {
        rings.left.advance(item.pages);
        rings.right.advance(item.pages + 1);
        rings.rope.advance(item.pages);
        q.advance();
      }
      at.advance();
      ptx::mbarrier_wait(&shared_.barriers.item_empty[at.slot()], at.phase() ^ 1);
      WorkItem& next = shared_.items[at.slot()];
      next_item(params_, rules, position_, walk, next);
      next.left = rings.left.position();
      next.right = rings.right.position();
      next.rope = rings.rope.position();
      next.query_phase = q.phase();
      ::cuda::ptx::mbarrier_arrive(&shared_.barriers.item_full[at.slot()]);
      if (!next.end && next.pages > 0) load_query(next, q);
    }
  }

  // Of every item in order, the pages' parts of this warp's kind, and Q's right half; of the first,
  // what begin() has left. Where memory is all that counts, all parts of a page are asked for when
  // its left half is, the last one that there is room for: together they are read fastest. A pair,
  // which has half as many pages on their way for as much memory, brings those of a long part into
  // L2 one page ahead, but for an item's first and one in 32, whose numbers no lane holds yet. L2
  // is asked to let pages go once they are loaded as traits.h says (kStreamedPages).
  __device__ void load_pages() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Part part = part_of(warp);
    bool first = true;  // page, which begin() has loaded
    Ring left = Rings().left;
    for (Ring at(0, kItems);; at.advance()) {
      ptx::mbarrier_wait(&shared_.barriers.item_full[at.slot()], at.phase());
      const WorkItem& item = shared_.items[at.slot()];
      if (item.end) break;
      const int pages = item.pages;
      const bool is_long = shared_.first.rules.payload > T::kStreamedPages;
      const bool ahead = T::kMulticast && is_long && params_.prefetch_pages;
      const bool stream = ahead ? pages <= T::kStreamedItemPages : !is_long;
      const bool prefetches = ahead && warp == kRopeWarp && position_.rank() == 0;
      const int32_t* table = table_of(item);
      int pages_ahead = lane < pages ? __ldg(table + lane) : 0;
      if (pages > 0 && warp == kRightWarp) {
        // Equal to part.ring, but with numbers that the compiler knows: else a register spills.
        const Ring right(kLeftBuffers, kRightBuffers, part.ring.position());
        if (lane == 0 && !first) load_right_query(item, right);
        part.ring.advance();
      }
      for (int i = 0; i < pages; ++i) {
        if (i % 32 == 0 && i > 0) pages_ahead = i + lane < pages ? __ldg(table + i + lane) : 0;
        const int page = __shfl_sync(~0u, pages_ahead, i % 32);
        if (prefetches && lane == i % 32 + 1 && i + 1 < pages) prefetch_page(pages_ahead);
        if (lane == 0 && !first) {
          if constexpr (!T::kMulticast) wait_until_empty(left);
          load<T::kMulticast>(part, item.head, page, stream);
        }
        left.advance();
        first = false;
        part.ring.advance();
        __syncwarp();
      }
      first = false;
      __syncwarp();
      if (lane == 0) ::cuda::ptx::mbarrier_arrive(&shared_.barriers.item_empty[at.slot()]);
    }
  }

 private:
  const KernelParams& params_;
  const TensorMaps& maps_;
  SharedStorage& shared_;
  Position<T::kCluster> position_;

  // Until nobody reads the buffer any more.
  __device__ __forceinline__ void wait_until_empty(const Ring& at) {
    ptx::mbarrier_wait(&shared_.barriers.empty[at.buffer()], at.phase() ^ 1);
  }
  // Waits for that, and announces `bytes`.
  __device__ uint64_t* begin_load(const Ring& at, int bytes) {
    namespace p = ::cuda::ptx;
    uint64_t* full = &shared_.barriers.full[at.buffer()];
    wait_until_empty(at);
    p::mbarrier_arrive_expect_tx(p::sem_release, p::scope_cta, p::space_shared, full, bytes);
    return full;
  }

  __device__ void load_query_tiles(const WorkItem& item, const CUtensorMap& map, int tile,
                                   uint8_t* target, uint64_t* full) {
    const int token = params_.map_width.quotient(item.first_row);
    const int head = item.head * params_.heads_per_kv + item.first_row - token * params_.map_width;
    const int32_t at[5] = {0, head, token, tile, item.request};
    ptx::stream_box<false>(&map, target, full, at, 0);
  }

  __device__ __forceinline__ void load_query(const WorkItem& item, const Ring& at) {
    uint64_t* full = begin_load(at, kHalfBytes + 2 * kTileBytes);
    for (int i = 0; i < 2; ++i) {
      load_query_tiles(item, maps_.query_rope, kRopeTile - 1 + i, shared_.q_end[i], full);
    }
    load_query_tiles(item, maps_.query_half, 0, shared_.q_left, full);
  }
  __device__ __forceinline__ void load_right_query(const WorkItem& item, const Ring& at) {
    uint64_t* full = begin_load(at, kHalfBytes);
    load_query_tiles(item, maps_.query_half, kHalfTiles, shared_.half[at.buffer()], full);
  }

  __device__ __forceinline__ const int32_t* table_of(const WorkItem& item) const {
    return params_.decode.block_table + item.request * params_.decode.stride_block_table_b +
           item.first_token / kPageTokens;
  }

  // Into L2, in one run: the parts' boxes then find it there.
  __device__ __forceinline__ void prefetch_page(int page) const {
    if (static_cast<uint32_t>(page) >= static_cast<uint32_t>(params_.decode.num_pages)) return;
    ptx::prefetch_bulk(static_cast<const typename T::Element*>(params_.decode.kv_cache) +
                           page * params_.decode.stride_kv_page,
                       kPageTokens * kHeadDimQk * sizeof(typename T::Element));
  }

  // One kind of a page's parts. A pair of CTAs shares the load of a page: CTA sender() sends the
  // part to both. CTA 0 sends the left half, CTA 1 the right half, and they take turns with RoPE.
  struct Part {
    Ring ring;
    int tile;
    __device__ __forceinline__ int sender() const {
      return tile == kRopeTile ? ring.position() % 2 : tile == kHalfTiles;
    }
  };
  __device__ __forceinline__ Part part_of(int warp) const {
    const Rings rings;
    if (warp == kRightWarp) return {rings.right, kHalfTiles};
    if (warp == kLeftWarp) return {rings.left, 0};
    return {Ring(kHalfBuffers, kRopeBuffers), kRopeTile};
  }
  template <bool kMulticast>
  __device__ __forceinline__ void load(const Part& part, int head, int page, bool stream) {
    const bool rope = part.tile == kRopeTile;
    uint64_t* full = begin_load(part.ring, rope ? kTileBytes : kHalfBytes);
    if (kMulticast && position_.rank() != part.sender()) return;
    const CUtensorMap* map = rope ? &maps_.rope : &maps_.half;
    uint8_t* target = rope ? shared_.rope[part.ring.slot()] : shared_.half[part.ring.buffer()];
    const int32_t box[5] = {0, 0, part.tile, head, page};
    if (stream) {
      ptx::stream_box<kMulticast>(map, target, full, box, T::kClusterMask);
    } else {
      ptx::load_box<kMulticast>(map, target, full, box, T::kClusterMask);
    }
  }
};

}  // namespace flash_mla::cuda::decode_dense
