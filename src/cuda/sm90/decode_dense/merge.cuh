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

#include "cuda/ptx/tma.cuh"
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
  uint32_t phase = 0;  // of merge_full

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

  // out = sum_k weight[k] partial[k] / total, weight[k] = 2^(max[k] - max). This CTA's share of the
  // tile is a run of units, the same in every piece, which come by bulk copies, all at once where
  // there is room, into the page buffers: no longer needed.
  __device__ __forceinline__ void merge(const WorkItem& item, bool whole) {
    const int pieces = item.piece_count;
    const int units = ceil_div(item.rows, 16) * kUnitsPerRowWarp;
    const int begin = whole ? 0 : ceil_div(units * item.piece_index, pieces);
    const int end = whole ? units : ceil_div(units * (item.piece_index + 1), pieces);
    RowState* states = reinterpret_cast<RowState*>(shared.half[0]);               // [pieces][64]
    float4* data = reinterpret_cast<float4*>(shared.half[0]) + pieces * kUnit4s;  // [pieces][batch]
    const int batch = min(end - begin, kRoom / (pieces * kUnitBytes) - 1);
    const Rows<Element> rows{params, item};
    for (int first = begin; first < end; first += batch) {
      const int count = min(batch, end - first);
      if (first > begin) meet();  // the units before are no longer read
      if (threadIdx.x < 32) load(item, states, data, first, count, first == begin);
      ptx::mbarrier_wait(&shared.merge_full, phase);
      phase ^= 1;
      if (first == begin) weigh(item, rows, states, whole);
      for (int unit = static_cast<int>(threadIdx.x) / 32; unit < count;
           unit += kOutputThreads / 32) {
        merge_unit(rows, states, data + unit * kUnit4s, count, pieces, first + unit);
      }
    }
  }

  static constexpr int kUnit4s = kUnitBytes / sizeof(float4);
  static constexpr int kRoom = kHalfBuffers * kHalfBytes + kHalfBytes + kTileBytes;
  static_assert(kRoom / (kMaxPieces * kUnitBytes) >= 2);
  static_assert(kTileRows * sizeof(RowState) == kUnitBytes);

  // By one warp.
  __device__ __forceinline__ void load(const WorkItem& item, RowState* states, float4* data,
                                       int first, int count, bool with_states) {
    namespace p = ::cuda::ptx;
    const int pieces = item.piece_count;
    if (threadIdx.x == 0) {
      p::mbarrier_arrive_expect_tx(p::sem_release, p::scope_cta, p::space_shared,
                                   &shared.merge_full,
                                   pieces * (count + (with_states ? 1 : 0)) * kUnitBytes);
    }
    __syncwarp();
    p::fence_proxy_async();  // what was written and acquired here comes before the copies
    for (int k = threadIdx.x; k < pieces; k += 32) {
      float* source = partial_output(params, cta_of(item, k), k == 0);
      p::cp_async_bulk(p::space_cluster, p::space_global, data + k * count * kUnit4s,
                       reinterpret_cast<float4*>(source) + first * kUnit4s, count * kUnitBytes,
                       &shared.merge_full);
      if (with_states) {
        p::cp_async_bulk(p::space_cluster, p::space_global, states + k * kTileRows,
                         partial_rows(source), kUnitBytes, &shared.merge_full);
      }
    }
  }

  // Puts the weights in the place of the maxima, and 1 / total in the place of piece 0's sums. Four
  // lanes a row.
  __device__ __forceinline__ void weigh(const WorkItem& item, const Rows<Element>& rows,
                                        RowState* states, bool whole) {
    const int row = threadIdx.x / 4, first = threadIdx.x % 4;
    const bool exists = row < item.rows;  // of the others no state was stored
    float top = kNoMaximum;
    for (int k = first; exists && k < item.piece_count; k += 4) {
      top = fmaxf(top, states[k * kTileRows + row].max);
    }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    float total = 0.f;
    for (int k = first; exists && k < item.piece_count; k += 4) {
      RowState& state = states[k * kTileRows + row];
      const float weight = ptx::exp2_approx(state.max - top);
      total += weight * state.sum;
      state.max = weight;
    }
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (first == 0) {
      states[row].sum = total > 0.f ? __fdividef(1.f, total) : 0.f;
      if (item.piece_index == 0 || whole) rows.store_lse(row, {top, total});
    }
    meet();
  }

  // By one warp; the pieces' units lie `stride` units apart.
  __device__ __forceinline__ void merge_unit(const Rows<Element>& rows, const RowState* states,
                                             const float4* data, int stride, int pieces, int unit) {
    const int lane = threadIdx.x % 32;
    const int row = unit / kUnitsPerRowWarp * 16 + lane / 4;
    const int column =
        (unit % 2) * (kHeadDimV / 2) + unit % kUnitsPerRowWarp / 2 * 8 + lane % 4 * 2;
    const RowState* state = states + row;
    float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
    for (int k = 0; k < pieces; ++k) {
      const float4 value = data[k * stride * kUnit4s + lane];
      const float weight[2] = {state[k * kTileRows].max, state[k * kTileRows + 8].max};
      sum.x += weight[0] * value.x;
      sum.y += weight[0] * value.y;
      sum.z += weight[1] * value.z;
      sum.w += weight[1] * value.w;
    }
    const float inverse[2] = {state[0].sum, state[8].sum};
    if (rows.valid(row)) {
      *reinterpret_cast<uint32_t*>(rows.out(row) + column) =
          pack<Element>(sum.x * inverse[0], sum.y * inverse[0]);
    }
    if (rows.valid(row + 8)) {
      *reinterpret_cast<uint32_t*>(rows.out(row + 8) + column) =
          pack<Element>(sum.z * inverse[1], sum.w * inverse[1]);
    }
  }
};

}  // namespace flash_mla::cuda::decode_dense
