// Merging the pieces of a split tile, in the same launch: help or leave.
//
// A CTA that has stored its partial result adds itself to the tile's counter. When its own work is
// done it waits, for a bounded time, until all pieces have arrived, and merges its share of the
// tile, so that every CTA of the tile helps. If the time runs out (another decode holds the SMs
// that the missing CTAs need) it leaves; the last to arrive sees that somebody left and merges the
// whole tile. Nobody waits for a CTA that may not be running for longer than kPatience, so nothing
// can hang; and a share's result does not depend on who computes it: if two do, they write the same
// bits. docs/design/0002-help-or-leave-merge.md.
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

  // Called by both output warpgroups when the partial result of `item` is stored.
  __device__ __forceinline__ void arrive(const WorkItem& item) {
    meet();
    if (threadIdx.x == 0) {
      const Counter before = ptx::atomic_add_gpu(counter(item), kArrival);
      const bool last = (before & 0xFFFF) + 1 == static_cast<Counter>(item.piece_count);
      SplitTile& tile = shared.split_tiles[shared.num_split_tiles++];
      tile.item = item;
      tile.leavers = last ? static_cast<int32_t>((before >> 16) & 0xFFFF) : 0;
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
        before_departure = ptx::atomic_add_gpu(counter(item), kDeparture * (1 + tile.leavers));
      }
    }
    meet();
    if (!shared.merge_ready) return;
    if (item.rows > 0) merge(item, tile.leavers > 0);
    if (threadIdx.x == 0 &&
        (before_departure >> 32) + 1 + tile.leavers == static_cast<Counter>(item.piece_count)) {
      *counter(item) = 0;
    }
    meet();  // the next tile reuses the scratch
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

  // out = sum_k weight[k] partial[k], weight[k] = 2^(max[k] - max) / sum. The page buffers, no
  // longer needed, hold the weights.
  __device__ __forceinline__ void merge(const WorkItem& item, bool whole) {
    const int pieces = item.piece_count;
    float* weights = reinterpret_cast<float*>(shared.half[0]);  // [pieces][64]
    float* sums = reinterpret_cast<float*>(shared.half[2]);     // [pieces][64]
    float* tops = sums + kMaxPieces * kTileRows;                // [4][64]
    float* totals = tops + 4 * kTileRows;                       // [4][64]
    const int row = threadIdx.x % kTileRows, quarter = threadIdx.x / kTileRows;
    float top = kNoMaximum;
    for (int k = quarter; k < pieces; k += 4) {
      // Rows past the last one have no state.
      float2 state = {kNoMaximum, 0.f};
      if (row < item.rows)
        state = __ldcg(reinterpret_cast<const float2*>(partial_rows(piece(item, k)) + row));
      weights[k * kTileRows + row] = state.x;
      sums[k * kTileRows + row] = state.y;
      top = fmaxf(top, state.x);
    }
    tops[threadIdx.x] = top;
    meet();
    top = fmaxf(fmaxf(tops[row], tops[kTileRows + row]),
                fmaxf(tops[2 * kTileRows + row], tops[3 * kTileRows + row]));
    float total = 0.f;
    for (int k = quarter; k < pieces; k += 4) {
      const float weight = ptx::exp2_approx(weights[k * kTileRows + row] - top);
      weights[k * kTileRows + row] = weight;
      total += weight * sums[k * kTileRows + row];
    }
    totals[threadIdx.x] = total;
    meet();
    total = (totals[row] + totals[kTileRows + row]) +
            (totals[2 * kTileRows + row] + totals[3 * kTileRows + row]);
    const Rows<Element> rows{params, item};
    if (quarter == 0) {
      tops[row] = total > 0.f ? __fdividef(1.f, total) : 0.f;
      if (item.piece_index == 0 || whole) rows.store_lse(row, {top, total});
    }
    meet();
    merge_output(item, rows, weights, tops, whole);
  }

  // A task is what one warp holds of one tile of eight columns: 64 tasks for every 16 rows, dealt
  // out to the pieces' CTAs. A warp, whose tasks are all of the same rows, keeps sixteen loads in
  // flight: four tasks of four pieces each while tasks are many, one task of sixteen pieces
  // otherwise.
  __device__ __forceinline__ void merge_output(const WorkItem& item, const Rows<Element>& rows,
                                               const float* weights, const float* inverses,
                                               bool whole) {
    const int row_warps = item.rows > 32 ? 4 : (item.rows > 16 ? 2 : 1);
    const int tasks = 64 * row_warps;
    const int begin = whole ? 0 : tasks * item.piece_index / item.piece_count;
    const int end = whole ? tasks : tasks * (item.piece_index + 1) / item.piece_count;
    int task = begin + threadIdx.x / 32;
    const int lane = threadIdx.x % 32, row_warp = task % row_warps, row = row_warp * 16 + lane / 4;
    const Share share = {item.piece_count,
                         reinterpret_cast<const float4*>(piece(item, 1)) + row_warp * 32 + lane,
                         params.schedule.team * T::kCluster *
                             static_cast<int64_t>(2 * kPartialBytes / sizeof(float4)),
                         weights + row,
                         {inverses[row], inverses[row + 8]},
                         {rows.valid(row) ? rows.out(row) + lane % 4 * 2 : nullptr,
                          rows.valid(row + 8) ? rows.out(row + 8) + lane % 4 * 2 : nullptr}};
    constexpr int kWarps = kOutputThreads / 32;
#pragma unroll 1
    for (; task + kWarps < end; task += 2 * kWarps)
      merge_tiles<2, 8>(share, task / row_warps, kWarps / row_warps);
#pragma unroll 1
    for (; task < end; task += kWarps)
      merge_tiles<1, 16>(share, task / row_warps, kWarps / row_warps);
  }

  // What a warp's tasks have in common.
  struct Share {
    int pieces;
    const float4* second;  // this lane's first values of piece 1; piece 0 lies elsewhere
    int64_t piece_stride;  // in float4
    const float* weight;   // of this lane's row in piece 0
    float inverse[2];      // of this lane's two rows
    Element* out[2];       // null: no such row
  };
  // Piece 0 lies in slot 1 of its CTA, the others in slot 0 of theirs.
  __device__ __forceinline__ static const float4* values(const Share& share, int k) {
    const float4* values = share.second + (k - 1) * share.piece_stride;
    return k == 0 ? values + kPartialBytes / sizeof(float4) : values;
  }

  // Tiles 0-31 are warpgroup 0's columns, 32-63 warpgroup 1's.
  template <int kTiles, int kInFlight>
  __device__ __forceinline__ void merge_tiles(const Share& share, int first_tile, int stride) {
    int offset[kTiles];
    float4 sum[kTiles] = {};
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int tile = first_tile + t * stride;
      offset[t] = tile % 32 * kOutputThreads + tile / 32 * kWarpgroup;
    }
#pragma unroll 1
    for (int first = 0; first < share.pieces; first += kInFlight) {
      float4 value[kInFlight][kTiles];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (first + j >= share.pieces) break;
        const float4* source = values(share, first + j);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) value[j][t] = __ldcg(source + offset[t]);
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (first + j >= share.pieces) break;
        const float weight[2] = {share.weight[(first + j) * kTileRows],
                                 share.weight[(first + j) * kTileRows + 8]};
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          sum[t].x += weight[0] * value[j][t].x;
          sum[t].y += weight[0] * value[j][t].y;
          sum[t].z += weight[1] * value[j][t].z;
          sum[t].w += weight[1] * value[j][t].w;
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int column = (first_tile + t * stride) * 8;
      const float* inverse = share.inverse;
      if (share.out[0] != nullptr) {
        *reinterpret_cast<uint32_t*>(share.out[0] + column) =
            pack<Element>(sum[t].x * inverse[0], sum[t].y * inverse[0]);
      }
      if (share.out[1] != nullptr) {
        *reinterpret_cast<uint32_t*>(share.out[1] + column) =
            pack<Element>(sum[t].z * inverse[1], sum[t].w * inverse[1]);
      }
    }
  }

  __device__ __forceinline__ float* piece(const WorkItem& item, int k) const {
    return partial_output(params, cta_of(item, k), k == 0);
  }
};

}  // namespace flash_mla::cuda::decode_dense
