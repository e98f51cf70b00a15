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

  // Called by all consumers when the partial result of `item` is stored.
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

  // Called by all consumers when the CTA has no other work left.
  __device__ __forceinline__ void finish() {
    meet();
    for (int i = 0; i < shared.num_split_tiles; ++i) finish_tile(shared.split_tiles[i]);
  }

 private:
  __device__ __forceinline__ static void meet() {
    ptx::named_barrier_sync(kConsumersMeet, kConsumers);
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
    float* weights = reinterpret_cast<float*>(shared.page[0]);  // [pieces][64]
    float* sums = reinterpret_cast<float*>(shared.page[1]);     // [pieces][64]
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
  // out to the pieces' CTAs. A warp keeps sixteen loads in flight: four tasks of four pieces each
  // while tasks are many, one task of sixteen pieces otherwise.
  __device__ __forceinline__ void merge_output(const WorkItem& item, const Rows<Element>& rows,
                                               const float* weights, const float* inverses,
                                               bool whole) {
    const int tasks = 64 * row_warps(item);
    const int begin = whole ? 0 : tasks * item.piece_index / item.piece_count;
    const int end = whole ? tasks : tasks * (item.piece_index + 1) / item.piece_count;
    constexpr int kWarps = kConsumers / 32;
    int task = begin + threadIdx.x / 32;
    for (; task + 3 * kWarps < end; task += 4 * kWarps)
      merge_tasks<4, 4>(item, rows, weights, inverses, task, kWarps);
    for (; task < end; task += kWarps)
      merge_tasks<1, 16>(item, rows, weights, inverses, task, kWarps);
  }
  __device__ __forceinline__ static int row_warps(const WorkItem& item) {
    return (item.rows + 15) / 16;
  }

  template <int kTasks, int kInFlight>
  __device__ __forceinline__ void merge_tasks(const WorkItem& item, const Rows<Element>& rows,
                                              const float* weights, const float* inverses,
                                              int first_task, int stride) {
    const int lane = threadIdx.x % 32;
    int row[kTasks], tile[kTasks];  // tiles 0-31: warpgroup 0's columns, then 1's
    float4 sum[kTasks] = {};
#pragma unroll
    for (int t = 0; t < kTasks; ++t) {
      row[t] = (first_task + t * stride) % row_warps(item) * 16 + lane / 4;
      tile[t] = (first_task + t * stride) / row_warps(item);
    }
#pragma unroll 1
    for (int first = 0; first < item.piece_count; first += kInFlight) {
      float4 value[kTasks][kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (first + j >= item.piece_count) break;
        const float4* source = reinterpret_cast<const float4*>(piece(item, first + j));
#pragma unroll
        for (int t = 0; t < kTasks; ++t) {
          const int thread = tile[t] / 32 * kWarpgroup + row[t] / 16 * 32 + lane;
          value[t][j] = __ldcg(source + tile[t] % 32 * kConsumers + thread);
        }
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (first + j >= item.piece_count) break;
#pragma unroll
        for (int t = 0; t < kTasks; ++t) {
          const float* weight = weights + (first + j) * kTileRows + row[t];
          sum[t].x += weight[0] * value[t][j].x;
          sum[t].y += weight[0] * value[t][j].y;
          sum[t].z += weight[8] * value[t][j].z;
          sum[t].w += weight[8] * value[t][j].w;
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTasks; ++t) {
      const float inverse[2] = {inverses[row[t]], inverses[row[t] + 8]};
      const int column = tile[t] * 8 + (lane % 4) * 2;
      if (row[t] < item.rows) {
        *reinterpret_cast<uint32_t*>(rows.out(row[t]) + column) =
            pack<Element>(sum[t].x * inverse[0], sum[t].y * inverse[0]);
      }
      if (row[t] + 8 < item.rows) {
        *reinterpret_cast<uint32_t*>(rows.out(row[t] + 8) + column) =
            pack<Element>(sum[t].z * inverse[1], sum[t].w * inverse[1]);
      }
    }
  }

  __device__ __forceinline__ float* piece(const WorkItem& item, int k) const {
    return partial_output(params, cta_of(item, k), k == 0);
  }
};

}  // namespace flash_mla::cuda::decode_dense
