// Merging the pieces of a split tile, in the same launch.
//
// Two pieces, the common case where requests are many: the first to arrive stores its partial
// result and counts itself in; the other adds that to its own, which it still has in registers.
// Nobody waits.
//
// More pieces: every CTA stores its partial result and adds itself to the tile's counter; then help
// or leave. When a CTA's own work is done it waits, for a bounded time, until all
// pieces have arrived, and merges its share of the tile, so that every CTA of the tile helps. If
// the time runs out (another decode holds the SMs that the missing CTAs need) it leaves; whoever
// sees that somebody left merges the whole tile.
//
// Nobody waits for a CTA that may not be running for longer than kPatience, so nothing can hang;
// and the result does not depend on who computes it: if two do, they write the same bits.
// docs/design/0002-help-or-leave-merge.md.
//
// A counter is three 16-bit counts in one word: CTAs that arrived, that left, and that are done
// with the counter. The last of the latter resets it to zero, so the workspace is left as it was
// found.
#pragma once

#include "cuda/sm90/decode_dense/epilogue.cuh"

namespace flash_mla::cuda::decode_dense {

inline constexpr Counter kArrival = 1, kLeaver = 1ull << 16, kDeparture = 1ull << 32;
inline constexpr int64_t kPatience = 200'000;  // clocks; ordinary imbalance is a few thousand
inline constexpr int kMaxPieces = kMaxCtas;

template <typename T>
struct Merger {
  using Element = typename T::Element;
  const KernelParams& params;
  SharedStorage& shared;
  uint32_t phase = 0;  // of shared.merge_landed
  static constexpr int kWarps = kOutputThreads / 32;

  // Called by both output warpgroups when the sums of `item`, at `at` in the ring, are in `output`:
  // writes the result, or a partial one, and merges the tile if that is all it waited for.
  __device__ __forceinline__ void put_out(const WorkItem& item, const Output<T>& output, Ring at) {
    const Epilogue<T> epilogue{output, params};
    if (item.piece_count > 2) {
      epilogue.store_partial(item);
      arrive(item);
      return;
    }
    if (item.piece_count == 2) {
      bool last = other_arrived(item);
      if (!last) {
        epilogue.store_partial(item);
        last = arrive_second(item);
      }
      if (!last) return;
    }
    epilogue.store_output(item, item.piece_count == 2 ? other_piece(item, at) : nullptr);
  }

  // Called by both output warpgroups when the CTA has no other work left.
  __device__ __forceinline__ void finish() {
    meet();
#pragma unroll 1
    for (int i = 0; i < shared.num_split_tiles; ++i) finish_tile(shared.items[kItems + i]);
  }

 private:
  __device__ __forceinline__ static void meet() {
    ptx::named_barrier_sync(kOutputMeets, kOutputThreads);
  }

  // Of two pieces: whether the other one is stored. Asked first, since what arrives last need not
  // be stored.
  __device__ __forceinline__ bool other_arrived(const WorkItem& item) {
    meet();
    if (ptx::thread_index() == 0) {
      shared.merge_ready = ptx::load_acquire_gpu(counter(item)) != 0;
      if (shared.merge_ready) *counter(item) = 0;
    }
    meet();
    return shared.merge_ready;
  }
  // The partial result of one of two pieces is stored. Whether the other one is, too.
  __device__ __forceinline__ bool arrive_second(const WorkItem& item) {
    meet();
    if (ptx::thread_index() == 0) {
      shared.merge_ready = ptx::atomic_add_gpu(counter(item), kArrival) != 0;
      if (shared.merge_ready) *counter(item) = 0;
    }
    meet();
    return shared.merge_ready;
  }
  // The other one of two pieces, in this CTA's shared memory if no pages come after this item's.
  __device__ __forceinline__ const float* other_piece(const WorkItem& item, Ring at) {
    float* other = piece(item, 1 - item.piece_index);
    at.advance();
    ptx::mbarrier_wait(&shared.barriers.item_full[at.slot()], at.phase());
    if (!shared.items[at.slot()].end || item.rows == 0) return other;
    float* copy = reinterpret_cast<float*>(&shared);
    if (ptx::thread_index() == 0) {
      const int units = ceil_div<int>(item.rows, 16) * kUnitsPerRowWarp;
      constexpr int kStateBytes = kTileRows * sizeof(RowState);
      begin_copies(units * kUnitBytes + kStateBytes);
      ptx::fence_proxy_async_global();
      copy_to_shared(copy, other, units * kUnitBytes);
      copy_to_shared(copy + kPartialFloats, other + kPartialFloats, kStateBytes);
    }
    wait_copies();
    return copy;
  }

  // Copies from partial results to shared memory. One thread announces the bytes; who copies has
  // called fence_proxy_async_global(), since threads of other CTAs wrote them; all wait.
  __device__ __forceinline__ void begin_copies(int bytes) {
    namespace p = ::cuda::ptx;
    p::mbarrier_arrive_expect_tx(p::sem_release, p::scope_cta, p::space_shared,
                                 &shared.merge_landed, bytes);
  }
  __device__ __forceinline__ void copy_to_shared(void* target, const void* source, int bytes) {
    namespace p = ::cuda::ptx;
    p::cp_async_bulk(p::space_cluster, p::space_global, target, source, bytes,
                     &shared.merge_landed);
  }
  __device__ __forceinline__ void wait_copies() {
    ptx::mbarrier_wait(&shared.merge_landed, phase);
    phase ^= 1;
  }

  // The partial result of one of more pieces is stored.
  __device__ __forceinline__ void arrive(const WorkItem& item) {
    meet();
    if (ptx::thread_index() == 0) {
      ptx::reduce_add_release(counter(item), kArrival);
      shared.items[kItems + shared.num_split_tiles++] = item;
    }
  }

  // CTA that does the rows of this CTA in piece `piece` of the tile.
  __device__ __forceinline__ int cta_of(const WorkItem& item, int piece) const {
    return static_cast<int>(ptx::cta_index()) +
           (piece - item.piece_index) * params.schedule.team * T::kCluster;
  }
  __device__ __forceinline__ Counter* counter(const WorkItem& item) const {
    return params.counters + cta_of(item, 0);
  }

  __device__ __forceinline__ void finish_tile(const WorkItem& item) {
    Counter before = 0;
    if (ptx::thread_index() == 0) before = wait_for_pieces(item);
    meet();
    if (shared.merge_ready && item.rows > 0) merge(item, shared.merge_ready == kWhole);
    if ((before >> 32) + 1 == static_cast<Counter>(item.piece_count)) *counter(item) = 0;
    ptx::fence_proxy_async();
    meet();  // the next tile reuses merge_ready and the scratch
  }

  // Sets shared.merge_ready: what this CTA does of the tile. Returns the counter as it was before
  // this CTA was done with it.
  enum { kNothing, kShare, kWhole };
  __device__ __forceinline__ Counter wait_for_pieces(const WorkItem& item) {
    const Counter all = item.piece_count;
    const int64_t start = clock64();
    while (true) {
      const Counter now = ptx::load_acquire_gpu(counter(item));
      if ((now & 0xFFFF) == all) {
        shared.merge_ready = (now >> 16 & 0xFFFF) > 0 ? kWhole : kShare;
        return ptx::atomic_add_relaxed(counter(item), kDeparture);
      }
      if (clock64() - start > kPatience) {
        const Counter before = ptx::atomic_add_gpu(counter(item), kLeaver + kDeparture);
        shared.merge_ready = (before & 0xFFFF) == all ? kWhole : kNothing;
        return before;
      }
    }
  }

  // out = sum_k weight[k] partial[k] / total, weight[k] = 2^(max[k] - max). This CTA's share of the
  // tile is a run of units, the same in every piece. How the units are summed depends on the tile
  // alone, and the order of the sums with it.
  __device__ __forceinline__ void merge(const WorkItem& item, bool whole) {
    const int units = ceil_div<int>(item.rows, 16) * kUnitsPerRowWarp;
    const Divider pieces(item.piece_count);
    const int begin = whole ? 0 : pieces.ceil_quotient(units * item.piece_index);
    const int end = whole ? units : pieces.ceil_quotient(units * (item.piece_index + 1));
    const int share = pieces.ceil_quotient(units);
    const bool few = share <= kFewUnits;
    const int most = few ? share : pieces.quotient(kMergedUnits);  // units at once
#pragma unroll 1
    for (int first = begin; first < end;) {
      // Units of the same 16 rows.
      const int row_warp = first / kUnitsPerRowWarp;
      const int last = min(min(end, first + most), (row_warp + 1) * kUnitsPerRowWarp);
      if (few) {
        merge_few(item, row_warp, first, last - first, share - 1);
      } else {
        merge_many(item, row_warp, first, last - first);
      }
      first = last;
      if (first < end) {  // the scratch is overwritten
        ptx::fence_proxy_async();
        meet();
      }
    }
  }

  // In the buffers of pages and Q, no longer needed.
  static constexpr int kMergedUnits = 320;  // of all pieces together
  struct Scratch {
    float4 values[kMergedUnits][32];  // [piece][unit]; of merge_few(): [warp]
    float2 weights[kMaxPieces][8];    // of rows r, r + 8
    float inverse[16];                // 1 / total
  };
  static_assert(sizeof(Scratch) <= offsetof(SharedStorage, q_end));
  static_assert(kMergedUnits >= kMaxPieces && kMaxPieces <= kOutputThreads);
  __device__ __forceinline__ Scratch& scratch() const {
    return *reinterpret_cast<Scratch*>(&shared);
  }

  // Units first .. first + count - 1, all of the same 16 rows. A run of units is contiguous in
  // every piece, so one copy brings it to shared memory; meanwhile the weights are worked out. (The
  // loops are short: a launch fetches its code from memory, and a short decode waits for it.)
  __device__ __forceinline__ void merge_many(const WorkItem& item, int row_warp, int first,
                                             int count) {
    Scratch& scratch = this->scratch();
    const int thread = static_cast<int>(ptx::thread_index()), warp = thread / 32,
              lane = thread % 32;
    float2 state[kStates];
    load_states(item, row_warp, state);
    if (lane == 0) {
      if (warp == 0) begin_copies(item.piece_count * count * kUnitBytes);
      ptx::fence_proxy_async_global();
#pragma unroll 1
      for (int k = warp; k < item.piece_count; k += kWarps) {
        copy_to_shared(scratch.values[k * count],
                       reinterpret_cast<const float4*>(piece(item, k)) + first * 32,
                       count * kUnitBytes);
      }
    }
    __syncwarp();
    weigh(item, row_warp, first, state);
    wait_copies();
    const Target target(*this, item, row_warp);
#pragma unroll 1
    for (int unit = warp; unit < count; unit += kWarps) {
      float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
      for (int k = 0; k < item.piece_count; ++k) {
        add(sum, scratch.weights[k][lane / 4], scratch.values[k * count + unit][lane]);
      }
      target.store(first + unit, sum);
    }
  }

  // The same for so few units that a copy of each would take longer than its bytes: 2^log_units of
  // them at once, each by 8 >> log_units warps, which share the pieces and load what they add.
  static constexpr int kFewUnits = 2;
  __device__ __forceinline__ void merge_few(const WorkItem& item, int row_warp, int first,
                                            int count, int log_units) {
    Scratch& scratch = this->scratch();
    const int thread = static_cast<int>(ptx::thread_index()), warp = thread / 32,
              lane = thread % 32;
    const int unit = warp & ((1 << log_units) - 1), share = warp >> log_units,
              shares = kWarps >> log_units;
    float4 sum = {0.f, 0.f, 0.f, 0.f};
    constexpr int kInFlight = 16;
#pragma unroll 1
    for (int begin = share; begin < item.piece_count; begin += kInFlight * shares) {
      float4 value[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int k = begin + i * shares;
        value[i] = {0.f, 0.f, 0.f, 0.f};
        if (k < item.piece_count && unit < count) {
          value[i] =
              __ldcg(reinterpret_cast<const float4*>(piece(item, k)) + (first + unit) * 32 + lane);
        }
      }
      if (begin == share) {
        float2 state[kStates];
        load_states(item, row_warp, state);
        weigh(item, row_warp, first, state);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int k = min(begin + i * shares, item.piece_count - 1);
        add(sum, scratch.weights[k][lane / 4], value[i]);
      }
    }
    scratch.values[warp][lane] = sum;
    meet();
    if (share > 0 || unit >= count) return;
#pragma unroll 1
    for (int other = warp + (1 << log_units); other < kWarps; other += 1 << log_units) {
      add(sum, {1.f, 1.f}, scratch.values[other][lane]);
    }
    Target(*this, item, row_warp).store(first + unit, sum);
  }

  __device__ __forceinline__ static void add(float4& sum, float2 weight, float4 value) {
    sum = {fmaf(weight.x, value.x, sum.x), fmaf(weight.x, value.y, sum.y),
           fmaf(weight.y, value.z, sum.z), fmaf(weight.y, value.w, sum.w)};
  }

  // The states of 16 rows, and their weights: 16 threads a row.
  static constexpr int kStates = (kMaxPieces + 15) / 16;  // of a thread
  __device__ __forceinline__ void load_states(const WorkItem& item, int row_warp,
                                              float2 (&state)[kStates]) {
    const int r = static_cast<int>(ptx::thread_index() / 16),
              first = static_cast<int>(ptx::thread_index() % 16);
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int k = first + 16 * i;
      state[i] = {kNoMaximum, 0.f};
      if (k < item.piece_count) {
        state[i] = __ldcg(reinterpret_cast<const float2*>(partial_rows(piece(item, k))) +
                          row_warp * 16 + r);
      }
    }
  }
  // Called by all, and waits for all.
  __device__ __forceinline__ void weigh(const WorkItem& item, int row_warp, int first_unit,
                                        const float2 (&state)[kStates]) {
    const int r = static_cast<int>(ptx::thread_index() / 16),
              first = static_cast<int>(ptx::thread_index() % 16);
    float top = kNoMaximum, total = 0.f;
#pragma unroll
    for (int i = 0; i < kStates; ++i) top = fmaxf(top, state[i].x);
#pragma unroll
    for (int distance = 1; distance < 16; distance *= 2) {
      top = fmaxf(top, __shfl_xor_sync(~0u, top, distance));
    }
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int k = first + 16 * i;
      const float weight = ptx::exp2_approx(state[i].x - top);
      total += weight * state[i].y;
      if (k < item.piece_count) {
        reinterpret_cast<float*>(&scratch().weights[k][r % 8])[r / 8] = weight;
      }
    }
#pragma unroll
    for (int distance = 1; distance < 16; distance *= 2) {
      total += __shfl_xor_sync(~0u, total, distance);
    }
    if (first == 0) {
      scratch().inverse[r] = inverse_or_zero(total);
      if (first_unit % kUnitsPerRowWarp == 0) {
        const Rows<Element> rows{params, item};
        rows.store_lse(rows.place(row_warp * 16 + r), {top, total});
      }
    }
    meet();
  }

  // Where this lane's sums go, once the weights are there.
  struct Target {
    Element* out[2];  // in its two rows; null: no such row
    float inverse[2];
    __device__ __forceinline__ Target(const Merger& merger, const WorkItem& item, int row_warp) {
      const Rows<Element> rows{merger.params, item};
      const int lane = lane_index();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto place = rows.place(row_warp * 16 + lane / 4 + 8 * h);
        out[h] = place.valid ? rows.out(place) + lane % 4 * 2 : nullptr;
        inverse[h] = merger.scratch().inverse[lane / 4 + 8 * h];
      }
    }
    __device__ __forceinline__ void store(int unit, float4 sum) const {
      const int column = unit % 2 * (kHeadDimV / 2) + unit % kUnitsPerRowWarp / 2 * 8;
      if (out[0] != nullptr) {
        *reinterpret_cast<uint32_t*>(out[0] + column) =
            pack<Element>(sum.x * inverse[0], sum.y * inverse[0]);
      }
      if (out[1] != nullptr) {
        *reinterpret_cast<uint32_t*>(out[1] + column) =
            pack<Element>(sum.z * inverse[1], sum.w * inverse[1]);
      }
    }
  };

  __device__ __forceinline__ float* piece(const WorkItem& item, int k) const {
    return partial_output(params, cta_of(item, k), k == 0);
  }
};

}  // namespace flash_mla::cuda::decode_dense
