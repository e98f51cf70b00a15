// What becomes of the accumulators when an item is done: normalised output rows, or a partial
// result for the merge.
#pragma once

#include "cuda/sm90/decode_dense/output.cuh"

namespace flash_mla::cuda::decode_dense {

// A row that saw no key, and so has the sum 0, gets output 0.
__device__ __forceinline__ float inverse_or_zero(float sum) {
  return sum == 0.f ? 0.f : __fdividef(1.f, sum);
}

// 1 / x of a power of two whose inverse is a normal number, too.
__device__ __forceinline__ float inverse_of_power(float x) {
  return __int_as_float((254 << 23) - __float_as_int(x));
}

// Places of the tile's rows in out and lse.
template <typename Element>
struct Rows {
  const KernelParams& params;
  const WorkItem& item;

  struct Place {
    int s, head;
    bool valid;
  };
  // Padded numbers (row_width > heads_per_kv) are no rows.
  __device__ __forceinline__ Place place(int row) const {
    const int r = item.first_row + row, s = params.row_width.quotient(r);
    const int head = r - s * params.row_width;
    return {s, item.head * params.heads_per_kv + head,
            row < item.rows && head < params.heads_per_kv};
  }
  __device__ __forceinline__ Element* out(const Place& at) const {
    const DecodeParams& decode = params.decode;
    return static_cast<Element*>(decode.out) + item.request * decode.stride_out_b +
           at.s * decode.stride_out_s + at.head * decode.stride_out_h;
  }
  // `sum` 0: the row saw no key. (NaN among its scores gives NaN.)
  __device__ __forceinline__ void store_lse(const Place& at, RowState state) const {
    const DecodeParams& decode = params.decode;
    if (decode.lse == nullptr || !at.valid) return;
    constexpr float kLn2 = 0.693147180559945309f;
    decode.lse[item.request * decode.stride_lse_b + at.head * decode.stride_lse_h +
               at.s * decode.stride_lse_s] =
        state.sum == 0.f ? decode.empty_lse : (state.max + __log2f(state.sum)) * kLn2;
  }
};

// The partial results of a tile's pieces. For each CTA of a part (team x cluster of them) there is
// a row of places, two a part: one for what it does of an item that it does not begin, one for what
// it does of an item that it does not end. An item has places from the second one of its first part
// on; none between them belongs to another. Each of two pieces has a place, units and then states;
// more lie in all their places as units [unit][piece] and then states [16 rows][piece], so that one
// copy brings what a CTA merges.
struct PartialPlaces {
  std::byte* units;
  int32_t unit_stride, piece_stride;  // of units
  std::byte* states;
  int32_t rows_stride, state_stride;  // of PartialStates, from 16 rows, or a piece, to the next
  __device__ __forceinline__ PartialPlaces(std::byte* base, int pieces)
      : units(base),
        unit_stride(pieces > 2 ? pieces * kUnitBytes : kUnitBytes),
        piece_stride(pieces > 2 ? kUnitBytes : kPartialBytes),
        states(base + (pieces > 2 ? pieces : 1) * kPartialUnitBytes),
        rows_stride((pieces > 2 ? pieces : 1) * sizeof(PartialStates)),
        state_stride(pieces > 2 ? sizeof(PartialStates) : kPartialBytes) {}
  __device__ __forceinline__ std::byte* unit(int i, int piece) const {
    return units + i * unit_stride + piece * piece_stride;
  }
  __device__ __forceinline__ PartialState* state(int row_warp, int piece) const {
    return reinterpret_cast<PartialState*>(states + row_warp * rows_stride + piece * state_stride);
  }
};
template <int kCluster>
__device__ __forceinline__ std::byte* first_place(const KernelParams& params,
                                                  const WorkItem& item) {
  const auto position = Position<kCluster>::here(params.schedule);
  const int row = position.member * kCluster + position.rank();
  const int part = position.part - item.piece_index;
  return params.partials +
         static_cast<int64_t>((row * params.schedule.num_parts + part) * 2 + 1) * kPartialBytes;
}

template <typename T>
struct Epilogue {
  using Element = typename T::Element;
  const Output<T>& output;
  const KernelParams& params;

  // Writes the item's rows of out and lse; of two pieces, with the other one's partial result,
  // `other`, added, else null. Both ways round that sum is the same, bit for bit: its products and
  // the sum are rounded one by one.
  __device__ __forceinline__ void store_output(const WorkItem& item, std::byte* other) const {
    const Rows<Element> rows{params, item};
    const int warpgroup = ptx::thread_index() / kWarpgroup, lane = lane_index(), row = row_index();
    if (row / 16 * 16 >= item.rows) return;
    float own_weight[2], other_weight[2];  // both over the sum
    Element* target[2];
    const bool odd = lane % 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const RowState own = output.state[h];
      RowState state = {kNoMaximum, 0.f};
      if (other != nullptr) {
        state = PartialPlaces(other, 2).state(row / 16, 0)[lane / 4 + 8 * h].row;
      }
      const float top = fmaxf(own.max, state.max);
      own_weight[h] = ptx::exp2_approx(own.max - top);
      other_weight[h] = ptx::exp2_approx(state.max - top);
      const float sum = weighted(own_weight[h], own.sum, other_weight[h], state.sum);
      const auto place = rows.place(row + 8 * h);
      if (warpgroup == 0 && lane % 4 == 0) rows.store_lse(place, {top, sum});
      own_weight[h] *= inverse_or_zero(sum);
      other_weight[h] *= inverse_or_zero(sum);
      // Of two neighbouring tiles of eight columns a lane has two columns each. Even lanes take the
      // next two of the first tile from their neighbour for theirs of the second, so that the four
      // lanes of a row store 32 bytes, a whole sector, at once.
      target[h] = place.valid ? rows.out(place) + warpgroup * (kHeadDimV / 2) +
                                    (odd ? 6 + lane % 4 * 2 : lane % 4 * 2)
                              : nullptr;
    }
    const float4* source = reinterpret_cast<const float4*>(other) +
                           (row / 16 * kUnitsPerRowWarp<false> + warpgroup) * 32 + lane;
    constexpr int kTiles = 4;
#pragma unroll
    for (int tile = 0; tile < 32; tile += kTiles) {
      float x[4 * kTiles];
      if (other != nullptr) {
        float4 value[kTiles];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) value[i] = source[(tile + i) * 64];
#pragma unroll
        for (int i = 0; i < 4 * kTiles; ++i) {
          const float4& v = value[i / 4];
          const float y = i % 4 == 0 ? v.x : (i % 4 == 1 ? v.y : (i % 4 == 2 ? v.z : v.w));
          x[i] =
              weighted(own_weight[i / 2 % 2], output.at(4 * tile + i), other_weight[i / 2 % 2], y);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4 * kTiles; ++i) x[i] = own_weight[i / 2 % 2] * output.at(4 * tile + i);
      }
#pragma unroll
      for (int i = 0; i < kTiles; i += 2) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t low = pack<Element>(x[4 * i + 2 * h], x[4 * i + 2 * h + 1]);
          const uint32_t high = pack<Element>(x[4 * i + 4 + 2 * h], x[4 * i + 5 + 2 * h]);
          const uint32_t neighbour = __shfl_xor_sync(~0u, odd ? low : high, 1);
          if (target[h] != nullptr) {
            *reinterpret_cast<uint2*>(target[h] + (tile + i) * 8) =
                odd ? uint2{neighbour, high} : uint2{low, neighbour};
          }
        }
      }
    }
  }
  __device__ __forceinline__ static float weighted(float own_weight, float own, float other_weight,
                                                   float other) {
    return __fadd_rn(__fmul_rn(own_weight, own), __fmul_rn(other_weight, other));
  }

  // Every store of a warp is a unit; warps without a row store nothing.
  template <bool kPacked>
  __device__ __forceinline__ void store_partial(const WorkItem& item,
                                                const PartialPlaces& places) const {
    const int lane = lane_index(), row_warp = row_index() / 16;
    if (row_warp * 16 >= item.rows) return;
    const int side = static_cast<int>(ptx::thread_index() / kWarpgroup);
    PartialState* states = places.state(row_warp, item.piece_index);
    float scale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      PartialState& state = states[lane / 4 + 8 * h];
      if (side == 0 && lane % 4 == 0) state.row = output.state[h];
      if constexpr (kPacked) {
        scale[h] = scale_of(h);
        if (lane % 4 == 0) state.scale[side] = inverse_of_power(scale[h]);
      }
    }
    std::byte* unit = places.unit(row_warp * kUnitsPerRowWarp<kPacked> + side, item.piece_index) +
                      lane * sizeof(uint4);
#pragma unroll
    for (int i = 0; i < kUnitsPerRowWarp<kPacked> / 2; ++i, unit += 2 * places.unit_stride) {
      if constexpr (kPacked) {
        uint32_t word[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          word[j] = pack<__half>(scale[j % 2] * output.at(8 * i + 2 * j),
                                 scale[j % 2] * output.at(8 * i + 2 * j + 1));
        }
        __stcg(reinterpret_cast<uint4*>(unit), uint4{word[0], word[1], word[2], word[3]});
      } else {
        __stcg(reinterpret_cast<float4*>(unit), float4{output.at(4 * i), output.at(4 * i + 1),
                                                       output.at(4 * i + 2), output.at(4 * i + 3)});
      }
    }
  }

 private:
  // The power of two that brings the largest value of a row in this warpgroup's half to between
  // 2^14 and 2^15.
  __device__ __forceinline__ float scale_of(int h) const {
    float most[4] = {};  // four chains
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      most[i % 4] = fmaxf(most[i % 4], fabsf(output.at(i / 2 * 4 + 2 * h + i % 2)));
    }
    float top = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    constexpr int kBias = 127, kTarget = 14;
    constexpr int kLeast = 15;  // so that 1 / scale is a normal number, too
    const int exponent = max(__float_as_int(top) >> 23, kLeast);
    return __int_as_float((2 * kBias + kTarget - exponent) << 23);
  }
};

}  // namespace flash_mla::cuda::decode_dense
