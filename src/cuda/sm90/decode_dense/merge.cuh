// Merging the pieces of a split tile, in the same launch. Every CTA stores its partial result and
// adds itself to the tile's counter.
//
// Few pieces, the common case where requests are many: the last to arrive merges them; nobody
// waits.
//
// More pieces: help or leave. When a CTA's own work is done it waits, for a bounded time, until all
// pieces have arrived, and merges its share of the tile, so that every CTA of the tile helps. If
// the time runs out (another decode holds the SMs that the missing CTAs need) it leaves; the last
// to arrive sees that somebody left and merges the whole tile.
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
inline constexpr int kFewPieces = 3;  // at most; the last CTA to arrive merges so many

template <typename T>
struct Merger {
  using Element = typename T::Element;
  const KernelParams& params;
  SharedStorage& shared;
  static constexpr int kWarps = kOutputThreads / 32;

  // Called by both output warpgroups when the item's sums are in `output`: writes the result, or a
  // partial one, and merges the tile if that is all it waited for.
  __device__ __forceinline__ void put_out(const WorkItem& item, Output<T>& output) {
    const Epilogue<T> epilogue{output, params};
    if (item.piece_count > 1) {
      epilogue.store_partial(item);
      if (arrive(item)) gather(item);
    } else {
      epilogue.store_output(item);
    }
  }

  // Called by both output warpgroups when the CTA has no other work left.
  __device__ __forceinline__ void finish() {
    meet();
    for (int i = 0; i < shared.num_split_tiles; ++i) finish_tile(shared.split_tiles[i]);
  }

 private:
  __device__ __forceinline__ static void meet() {
    ptx::named_barrier_sync(kOutputMeets, kOutputThreads);
  }

  // The partial result of `item` is stored. True: it was the last of few.
  __device__ __forceinline__ bool arrive(const WorkItem& item) {
    const bool few = item.piece_count <= kFewPieces;
    meet();
    if (threadIdx.x == 0) {
      const Counter before = ptx::atomic_add_gpu(counter(item), kArrival);
      const bool last = (before & 0xFFFF) + 1 == static_cast<Counter>(item.piece_count);
      if (few) {
        shared.merge_ready = last;
        if (last) *counter(item) = 0;
      } else {
        SplitTile& tile = shared.split_tiles[shared.num_split_tiles++];
        tile.item = item;
        tile.leavers = last ? static_cast<int32_t>((before >> 16) & 0xFFFF) : 0;
      }
    }
    if (!few) return false;
    meet();
    return shared.merge_ready;
  }

  // Merges few pieces, while the page buffers are in use. A warp takes units of its 16 rows, eight
  // at once.
  __device__ __forceinline__ void gather(const WorkItem& item) {
    const int row_warps = item.rows > 32 ? 4 : (item.rows > 16 ? 2 : 1);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row_warp = warp % row_warps;
    if (row_warp * 16 >= item.rows) return;
    const Rows<Element> rows{params, item};
    const float4* values[kFewPieces];
    float weight[kFewPieces][2];
    Element* out[2];
#pragma unroll
    for (int k = 0; k < kFewPieces; ++k) {
      values[k] = reinterpret_cast<const float4*>(piece(item, min(k, item.piece_count - 1)));
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row_warp * 16 + lane / 4 + 8 * h;
      float2 state[kFewPieces];
      float top = kNoMaximum, total = 0.f;
#pragma unroll
      for (int k = 0; k < kFewPieces; ++k) {
        state[k] = {kNoMaximum, 0.f};
        if (k < item.piece_count) {
          state[k] = __ldcg(reinterpret_cast<const float2*>(values[k] + kPartialFloats / 4) + row);
        }
        top = fmaxf(top, state[k].x);
      }
#pragma unroll
      for (int k = 0; k < kFewPieces; ++k) {
        weight[k][h] = ptx::exp2_approx(state[k].x - top);
        total += weight[k][h] * state[k].y;
      }
      const float inverse = inverse_or_zero(total);
#pragma unroll
      for (int k = 0; k < kFewPieces; ++k) weight[k][h] *= inverse;
      if (warp < row_warps && lane % 4 == 0) rows.store_lse(row, {top, total});
      out[h] = rows.valid(row) ? rows.out(row) + lane % 4 * 2 : nullptr;
    }
    constexpr int kUnits = 8;
    const int step = kWarps / row_warps;
#pragma unroll 1
    for (int first = warp / row_warps; first < kUnitsPerRowWarp; first += kUnits * step) {
      float4 value[kFewPieces][kUnits];
#pragma unroll
      for (int k = 0; k < kFewPieces; ++k) {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          value[k][u] = {0.f, 0.f, 0.f, 0.f};
          if (k < item.piece_count) {
            value[k][u] =
                __ldcg(values[k] + (row_warp * kUnitsPerRowWarp + first + u * step) * 32 + lane);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int k = 0; k < kFewPieces; ++k) add(sum, weight[k], value[k][u]);
        store(out, first + u * step, sum);
      }
    }
  }
  __device__ __forceinline__ static void add(float4& sum, const float (&weight)[2], float4 value) {
    sum.x += weight[0] * value.x;
    sum.y += weight[0] * value.y;
    sum.z += weight[1] * value.z;
    sum.w += weight[1] * value.w;
  }

  // CTA that does the rows of this CTA in piece `piece` of the tile.
  __device__ __forceinline__ int cta_of(const WorkItem& item, int piece) const {
    return blockIdx.x + (piece - item.piece_index) * params.schedule.team * T::kCluster;
  }
  __device__ __forceinline__ Counter* counter(const WorkItem& item) const {
    return params.counters + cta_of(item, 0);
  }

  __device__ __forceinline__ void finish_tile(const SplitTile& tile) {
    const WorkItem& item = tile.item;
    Counter before_departure = 0;
    if (threadIdx.x == 0) {
      shared.merge_ready = wait_for_pieces(item);
      if (shared.merge_ready) {
        before_departure = ptx::atomic_add_relaxed(counter(item), kDeparture * (1 + tile.leavers));
      }
    }
    meet();
    if (shared.merge_ready) {
      if (item.rows > 0) merge(item, tile.leavers > 0);
      if (threadIdx.x == 0 &&
          (before_departure >> 32) + 1 + tile.leavers == static_cast<Counter>(item.piece_count)) {
        *counter(item) = 0;
      }
    }
    meet();  // the next tile reuses merge_ready and the scratch
  }

  // False: gave up, and whoever arrives last knows.
  __device__ __forceinline__ bool wait_for_pieces(const WorkItem& item) {
    const Counter all = item.piece_count;
    const int64_t start = clock64();
    while ((ptx::load_acquire_gpu(counter(item)) & 0xFFFF) != all) {
      if (clock64() - start > kPatience) {
        return (ptx::atomic_add_gpu(counter(item), kLeaver) & 0xFFFF) == all;
      }
    }
    return true;
  }

  // out = sum_k weight[k] partial[k] / total, weight[k] = 2^(max[k] - max). This CTA's share of the
  // tile is a run of units, the same in every piece.
  __device__ __forceinline__ void merge(const WorkItem& item, bool whole) {
    const int units = ceil_div(item.rows, 16) * kUnitsPerRowWarp;
    const int begin = whole ? 0 : ceil_div(units * item.piece_index, item.piece_count);
    const int end = whole ? units : ceil_div(units * (item.piece_index + 1), item.piece_count);
    const Rows<Element> rows{params, item};
#pragma unroll 1
    for (int first = begin; first < end;) {
      // Units of the same 16 rows.
      const int row_warp = first / kUnitsPerRowWarp;
      const int last = min(end, (row_warp + 1) * kUnitsPerRowWarp);
      weigh(item, rows, row_warp, first % kUnitsPerRowWarp == 0);
      meet();
      merge_units(item, rows, row_warp, first, last);
      first = last;
      meet();  // the weights are overwritten
    }
  }

  // The page buffers, no longer needed.
  struct Scratch {
    RowState states[kMaxPieces][16];         // with the weights in the place of the maxima
    float inverse[16];                       // 1 / total
    float4 chunks[kOutputThreads / 32][32];  // sums of some of the pieces
  };
  static_assert(sizeof(Scratch) <= kHalfBuffers * kHalfBytes);
  __device__ __forceinline__ Scratch& scratch() const {
    return *reinterpret_cast<Scratch*>(shared.half[0]);
  }

  // Weights of 16 rows, 16 threads each.
  __device__ __forceinline__ void weigh(const WorkItem& item, const Rows<Element>& rows,
                                        int row_warp, bool store_lse) {
    const int r = threadIdx.x / 16, first = threadIdx.x % 16, row = row_warp * 16 + r;
    const bool exists = row < item.rows;  // of the others no state was stored
    float top = kNoMaximum;
#pragma unroll 4
    for (int k = first; k < item.piece_count; k += 16) {
      float2 state = {kNoMaximum, 0.f};
      if (exists)
        state = __ldcg(reinterpret_cast<const float2*>(partial_rows(piece(item, k)) + row));
      scratch().states[k][r] = {state.x, state.y};
      top = fmaxf(top, state.x);
    }
#pragma unroll
    for (int distance = 1; distance < 16; distance *= 2) {
      top = fmaxf(top, __shfl_xor_sync(~0u, top, distance));
    }
    float total = 0.f;
    for (int k = first; k < item.piece_count; k += 16) {
      RowState& state = scratch().states[k][r];
      state.max = ptx::exp2_approx(state.max - top);
      total += state.max * state.sum;
    }
#pragma unroll
    for (int distance = 1; distance < 16; distance *= 2) {
      total += __shfl_xor_sync(~0u, total, distance);
    }
    if (first == 0) {
      scratch().inverse[r] = inverse_or_zero(total);
      if (store_lse) rows.store_lse(row, {top, total});
    }
  }

  // Up to kAloneLimit pieces: a warp sums up all of a unit, in order; of four units at once where
  // there are as many. More: four warps a unit, each for every fourth piece.
  static constexpr int kAloneLimit = 32;
  __device__ __forceinline__ void merge_units(const WorkItem& item, const Rows<Element>& rows,
                                              int row_warp, int first, int last) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Element* out[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row_warp * 16 + lane / 4 + 8 * h;
      out[h] = rows.valid(row) ? rows.out(row) + lane % 4 * 2 : nullptr;
    }
    const bool many = item.piece_count > kAloneLimit;
    if (!many) {
#pragma unroll 1
      for (; first + 4 * kWarps <= last; first += 4 * kWarps) {
        float4 sum[4];
        sum_up<4, 4>(item, first + warp, 0, 1, sum);
#pragma unroll
        for (int u = 0; u < 4; ++u) store(out, first + warp + u * kWarps, normalise(sum[u]));
      }
    }
    const int share = many ? 4 : 1;  // warps that share a unit
#pragma unroll 1
    for (; first < last; first += kWarps / share) {
      const int unit = first + warp / share;
      float4 sum[1] = {};
      if (unit < last) sum_up<1, 16>(item, unit, warp % share, share, sum);
      if (many) {
        scratch().chunks[warp][lane] = sum[0];
        meet();
        for (int chunk = 1; chunk < share; ++chunk) {
          const float4 other = scratch().chunks[(warp + chunk) % kWarps][lane];
          add(sum[0], {1.f, 1.f}, other);
        }
        meet();
      }
      if (unit < last && warp % share == 0) store(out, unit, normalise(sum[0]));
    }
  }
  __device__ __forceinline__ float4 normalise(float4 sum) const {
    const float* inverse = scratch().inverse + threadIdx.x % 32 / 4;
    return {sum.x * inverse[0], sum.y * inverse[0], sum.z * inverse[8], sum.w * inverse[8]};
  }

  // sum[u] = sum of the weighted pieces first, first + stride .. of unit `unit` + u * kWarps, with
  // sixteen loads in flight.
  template <int kUnits, int kPieces>
  __device__ __forceinline__ void sum_up(const WorkItem& item, int unit, int first, int stride,
                                         float4 (&sum)[kUnits]) {
    const int lane = threadIdx.x % 32, count = item.piece_count;
    // Offsets in bytes fit 32 bits. Piece 0 lies in slot 1 of its CTA, the others in slot 0 of
    // theirs.
    const auto* base = reinterpret_cast<const std::byte*>(params.partials);
    const uint32_t piece_stride = params.schedule.team * T::kCluster * kPartialBytes;
    const uint32_t slot_stride = gridDim.x * kPartialBytes;
    const uint32_t here = cta_of(item, 0) * static_cast<uint32_t>(kPartialBytes) +
                          (unit * 32 + lane) * static_cast<uint32_t>(sizeof(float4));
#pragma unroll
    for (int u = 0; u < kUnits; ++u) sum[u] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
    for (int k = first; k < count; k += kPieces * stride) {
      float4 value[kPieces][kUnits];
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int at = k + j * stride;
        const uint32_t offset = here + at * piece_stride + (at == 0 ? slot_stride : 0);
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          value[j][u] = {0.f, 0.f, 0.f, 0.f};
          if (at < count) {
            value[j][u] =
                __ldcg(reinterpret_cast<const float4*>(base + offset + u * kWarps * kUnitBytes));
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const RowState* states = scratch().states[min(k + j * stride, count - 1)] + lane / 4;
        const float weight[2] = {states[0].max, states[8].max};
#pragma unroll
        for (int u = 0; u < kUnits; ++u) add(sum[u], weight, value[j][u]);
      }
    }
  }

  // `out`: this lane's place in its two rows; null: no such row.
  __device__ __forceinline__ void store(Element* const (&out)[2], int unit, float4 sum) {
    const int column = unit % 2 * (kHeadDimV / 2) + unit % kUnitsPerRowWarp / 2 * 8;
    if (out[0] != nullptr) {
      *reinterpret_cast<uint32_t*>(out[0] + column) = pack<Element>(sum.x, sum.y);
    }
    if (out[1] != nullptr) {
      *reinterpret_cast<uint32_t*>(out[1] + column) = pack<Element>(sum.z, sum.w);
    }
  }

  __device__ __forceinline__ float* piece(const WorkItem& item, int k) const {
    return partial_output(params, cta_of(item, k), k == 0);
  }
};

}  // namespace flash_mla::cuda::decode_dense
