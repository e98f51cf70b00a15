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
  uint32_t phases = 0;  // of shared.merge_landed, a bit each
  static constexpr int kWarps = kOutputThreads / 32;

  // Called by both output warpgroups when the sums of `item`, at `at` in the ring, are in `output`:
  // writes the result, or a partial one, and merges the tile if that is all it waited for.
  __device__ __forceinline__ void put_out(const WorkItem& item, const Output<T>& output, Ring at) {
    const Epilogue<T> epilogue{output, params};
    const bool many = item.piece_count > 2;
    const bool complete = item.piece_count == 1 || (!many && other_arrived(item));
    if (!complete) {
      if (many && packed(item)) {
        epilogue.template store_partial<true>(item, places(item));
      } else {
        epilogue.template store_partial<false>(item, places(item));
      }
      if (many) arrive(item);
      if (many || !arrive_second(item)) return;
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
  __device__ __forceinline__ std::byte* other_piece(const WorkItem& item, Ring at) {
    std::byte* other = places(item).unit(0, 1 - item.piece_index);
    at.advance();
    ptx::mbarrier_wait(&shared.barriers.item_full[at.slot()], at.phase());
    if (!shared.items[at.slot()].end || item.rows == 0) return other;
    std::byte* target = reinterpret_cast<std::byte*>(&shared);
    if (ptx::thread_index() == 0) {
      ptx::fence_proxy_async_global();
      const int bytes = ceil_div<int>(item.rows, 16) * kUnitsPerRowWarp<false> * kUnitBytes;
      copy(kUnits, target, other, bytes);
      constexpr int kStateBytes = kTileRows / 16 * sizeof(PartialStates);
      copy(kStates, target + kPartialUnitBytes, other + kPartialUnitBytes, kStateBytes);
    }
    wait(kUnits);
    wait(kStates);
    return target;
  }

  // Copies from partial results to shared memory, by one thread that has called
  // fence_proxy_async_global(), since threads of other CTAs wrote them; all wait for each.
  enum Copies { kUnits, kStates };
  __device__ __forceinline__ void copy(Copies what, void* target, const void* source, int bytes) {
    namespace p = ::cuda::ptx;
    uint64_t* landed = &shared.merge_landed[what];
    p::mbarrier_arrive_expect_tx(p::sem_release, p::scope_cta, p::space_shared, landed, bytes);
    p::cp_async_bulk(p::space_cluster, p::space_global, target, source, bytes, landed);
  }
  __device__ __forceinline__ void wait(Copies what) {
    ptx::mbarrier_wait(&shared.merge_landed[what], phases >> what & 1);
    phases ^= 1u << what;
  }

  // How a piece of more than two is stored: in half the bytes where they are many, with less code
  // where they are few.
  __device__ __forceinline__ static bool packed(const WorkItem& item) { return item.rows > 16; }

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
    if (shared.merge_ready && item.rows > 0) {
      const bool whole = shared.merge_ready == kWhole;
      if (packed(item)) {
        merge<true>(item, whole);
      } else {
        merge<false>(item, whole);
      }
    }
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

  // n / divisor for 0 <= n < 2^16, 0 < divisor < 2^8 and a quotient below 2^12, in a few
  // instructions: n + 0.5 is further from a multiple than the division errs.
  __device__ __forceinline__ static int quotient(int n, int divisor) {
    return static_cast<int>(__fdividef(static_cast<float>(n) + 0.5f, static_cast<float>(divisor)));
  }

  template <bool kPacked>
  __device__ __forceinline__ static int units_of(const WorkItem& item) {
    return ceil_div<int>(item.rows, 16) * kUnitsPerRowWarp<kPacked>;
  }
  __device__ __forceinline__ PartialPlaces places(const WorkItem& item) const {
    return {first_place<T::kCluster>(params, item), item.piece_count};
  }

  // out = sum_k weight[k] partial[k] / total, weight[k] = 2^(max[k] - max). This CTA's share of the
  // tile is a run of units, the same in every piece. How the units are summed depends on the tile
  // alone, and the order of the sums with it. (The loops are short: a launch fetches its code from
  // memory, and a short decode waits for it.)
  template <bool kPacked>
  __device__ __forceinline__ void merge(const WorkItem& item, bool whole) {
    const int units = units_of<kPacked>(item), pieces = item.piece_count;
    const auto share_begin = [&](int k) { return quotient(units * k + pieces - 1, pieces); };
    const int begin = whole ? 0 : share_begin(item.piece_index);
    const int end = whole ? units : share_begin(item.piece_index + 1);
    const int share = share_begin(1);
    const PartialPlaces places = this->places(item);
    const int most = share <= kFewUnits ? share : quotient(kMergedUnits, pieces);  // units at once
#pragma unroll 1
    for (int first = begin; first < end;) {
      // Units of the same 16 rows.
      const int row_warp = first / kUnitsPerRowWarp<kPacked>;
      const int last = min(min(end, first + most), (row_warp + 1) * kUnitsPerRowWarp<kPacked>);
      merge_run<kPacked>(item, places, row_warp, first, last - first, share);
      first = last;
      if (first < end) {  // the scratch is overwritten
        ptx::fence_proxy_async();
        meet();
      }
    }
  }

  // In the buffers of pages, Q and P, no longer needed.
  static constexpr int kMergedUnits = 320;  // of all pieces together
  static constexpr int kFewUnits = 2;       // a share of so many is added up by all warps together
  template <bool kPacked>
  struct Sum {  // of a lane in a unit
    static constexpr int kCount = 4 * kUnitTiles<kPacked>;
    float at[kCount];
  };
  struct Scratch {
    uint4 values[kMergedUnits][32];  // [unit][piece]
    PartialStates states[kMaxPieces];
    Sum<true> sums[kWarps][32];        // of few units
    float2 weights[kMaxPieces][2][8];  // of rows r, r + 8; of their two halves, if packed
    float inverse[16];                 // 1 / total
  };
  static_assert(sizeof(Scratch) <= offsetof(SharedStorage, factor));
  static_assert(kMergedUnits >= kFewUnits * kMaxPieces);
  __device__ __forceinline__ Scratch& scratch() const {
    return *reinterpret_cast<Scratch*>(&shared);
  }

  // Units first .. first + count - 1, all of the same 16 rows, of a share of `share`. One copy
  // brings the states of all pieces, another one the units; meanwhile the weights are worked out.
  template <bool kPacked>
  __device__ __forceinline__ void merge_run(const WorkItem& item, const PartialPlaces& places,
                                            int row_warp, int first, int count, int share) {
    Scratch& scratch = this->scratch();
    const int warp = static_cast<int>(ptx::thread_index() / 32), lane = lane_index();
    const int pieces = item.piece_count;
    if (ptx::thread_index() == 0) {
      ptx::fence_proxy_async_global();
      copy(kStates, scratch.states, places.state(row_warp, 0), pieces * sizeof(PartialStates));
      copy(kUnits, scratch.values, places.unit(first, 0), pieces * count * kUnitBytes);
    }
    const Target target(*this, item, row_warp);
    wait(kStates);
    weigh<kPacked>(item, pieces, row_warp, first);
    wait(kUnits);
    if (share > kFewUnits) {
#pragma unroll 1
      for (int unit = warp; unit < count; unit += kWarps) {
        Sum<kPacked> sum = {};
#pragma unroll 4
        for (int k = 0; k < pieces; ++k) {
          add(sum, weights<kPacked>(k, first + unit)[lane / 4],
              scratch.values[unit * pieces + k][lane]);
        }
        target.template store<kPacked>(first + unit, sum);
      }
      return;
    }
    // `share` units at once, each by 8 / share warps, which share the pieces.
    const int unit = warp & (share - 1), part = warp >> (share - 1), parts = kWarps >> (share - 1);
    const int end = unit < count ? pieces : 0;
    const uint4* values = &scratch.values[unit * pieces][lane];
    Sum<kPacked> sum = {};
#pragma unroll 2
    for (int k = part; k < end; k += parts) {
      add(sum, weights<kPacked>(k, first + unit)[lane / 4], values[k * 32]);
    }
#pragma unroll
    for (int i = 0; i < sum.kCount; ++i) scratch.sums[warp][lane].at[i] = sum.at[i];
    meet();
    if (part > 0 || unit >= count) return;
#pragma unroll 1
    for (int other = warp + share; other < kWarps; other += share) {
#pragma unroll
      for (int i = 0; i < sum.kCount; ++i) sum.at[i] += scratch.sums[other][lane].at[i];
    }
    target.template store<kPacked>(first + unit, sum);
  }

  __device__ __forceinline__ static void add(Sum<false>& sum, float2 weight, uint4 value) {
    sum.at[0] = fmaf(weight.x, __uint_as_float(value.x), sum.at[0]);
    sum.at[1] = fmaf(weight.x, __uint_as_float(value.y), sum.at[1]);
    sum.at[2] = fmaf(weight.y, __uint_as_float(value.z), sum.at[2]);
    sum.at[3] = fmaf(weight.y, __uint_as_float(value.w), sum.at[3]);
  }
  __device__ __forceinline__ static void add(Sum<true>& sum, float2 weight, uint4 value) {
    const uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = __half22float2(reinterpret_cast<const __half2&>(words[i]));
      const float of_row = i % 2 == 0 ? weight.x : weight.y;
      sum.at[2 * i] = fmaf(of_row, x.x, sum.at[2 * i]);
      sum.at[2 * i + 1] = fmaf(of_row, x.y, sum.at[2 * i + 1]);
    }
  }
  // Of piece k, for rows r, r + 8 of a unit.
  template <bool kPacked>
  __device__ __forceinline__ const float2* weights(int k, int unit) const {
    return scratch().weights[k][kPacked ? unit % 2 : 0];
  }

  // The pieces' weights for 16 rows, 16 threads a row. Called by all, and waits for all.
  template <bool kPacked>
  __device__ __forceinline__ void weigh(const WorkItem& item, int pieces, int row_warp,
                                        int first_unit) {
    Scratch& scratch = this->scratch();
    const int row = static_cast<int>(ptx::thread_index() / 16),
              first = static_cast<int>(ptx::thread_index() % 16);
    float top = kNoMaximum, total = 0.f;
#pragma unroll 1
    for (int k = first; k < pieces; k += 16) top = fmaxf(top, scratch.states[k][row].row.max);
#pragma unroll
    for (int distance = 1; distance < 16; distance *= 2) {
      top = fmaxf(top, __shfl_xor_sync(~0u, top, distance));
    }
#pragma unroll 1
    for (int k = first; k < pieces; k += 16) {
      const PartialState& state = scratch.states[k][row];
      const float weight = ptx::exp2_approx(state.row.max - top);
      total += weight * state.row.sum;
      auto* of_rows = reinterpret_cast<float(*)[8][2]>(&scratch.weights[k]);
#pragma unroll
      for (int side = 0; side < (kPacked ? 2 : 1); ++side) {
        of_rows[side][row % 8][row / 8] = kPacked ? weight * state.scale[side] : weight;
      }
    }
#pragma unroll
    for (int distance = 1; distance < 16; distance *= 2) {
      total += __shfl_xor_sync(~0u, total, distance);
    }
    if (first == 0) scratch.inverse[row] = inverse_or_zero(total);
    meet();
    if (first == 0 && first_unit % kUnitsPerRowWarp<kPacked> == 0) {
      const Rows<Element> rows{params, item};
      rows.store_lse(rows.place(row_warp * 16 + row), {top, total});
    }
  }

  // Where this lane's sums go.
  struct Target {
    Element* out[2];       // in its two rows; null: no such row
    const float* inverse;  // of the first one's total; eight on, the other one's
    __device__ __forceinline__ Target(const Merger& merger, const WorkItem& item, int row_warp) {
      const Rows<Element> rows{merger.params, item};
      const int lane = lane_index();
      inverse = merger.scratch().inverse + lane / 4;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto place = rows.place(row_warp * 16 + lane / 4 + 8 * h);
        out[h] = place.valid ? rows.out(place) + lane % 4 * 2 : nullptr;
      }
    }
    template <bool kPacked>
    __device__ __forceinline__ void store(int unit, const Sum<kPacked>& sum) const {
      const int column = unit % 2 * (kHeadDimV / 2) +
                         unit % kUnitsPerRowWarp<kPacked> / 2 * (8 * kUnitTiles<kPacked>);
#pragma unroll
      for (int i = 0; i < sum.kCount / 2; ++i) {
        if (out[i % 2] == nullptr) continue;
        *reinterpret_cast<uint32_t*>(out[i % 2] + column + i / 2 * 8) = pack<Element>(
            sum.at[2 * i] * inverse[i % 2 * 8], sum.at[2 * i + 1] * inverse[i % 2 * 8]);
      }
    }
  };
};

}  // namespace flash_mla::cuda::decode_dense
