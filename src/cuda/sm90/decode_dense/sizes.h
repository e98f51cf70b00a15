// Sizes of the dense decode kernel that host code without CUDA headers needs too.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/schedule.h"
#include "flash_mla/decode.h"

namespace flash_mla::cuda::decode_dense {

inline constexpr int kTileRows =
    kTileRowsAtMost;                    // query rows of a CTA, at most: what the products take
inline constexpr int kPageTokens = 64;  // tokens of a page, which is also the block of the products
inline constexpr int kMaxCtas = 132;    // SMs of the largest Hopper card

// What a row keeps of its scores, scaled, in base 2: `max`, the largest, give or take 8
// (kRescaleThreshold), and the sum of 2^(score - max).
struct RowState {
  float max, sum;
};

// A partial result: *units* of 512 bytes, 16 for each lane of a warp, of the lane's accumulators
// for kUnitTiles tiles of eight columns: [4 warps of 16 rows][left, right half of the tiles, unit
// by unit][32 lanes][kUnitTiles][row r, r + 8][2]; and the states of the rows. The accumulators are
// in fp32, or packed: in fp16, each half of a row scaled by a power of two, which `scale` takes
// back.
inline constexpr int kUnitBytes = 512;
template <bool kPacked>
inline constexpr int kUnitTiles = kPacked ? 2 : 1;
template <bool kPacked>
inline constexpr int kUnitsPerRowWarp = kHeadDimV / 8 / kUnitTiles<kPacked>;
struct alignas(16) PartialState {
  RowState row;
  float scale[2];  // of the left half, the right half; if packed
};
// Of 16 rows. One more, so that in shared memory a row's states lie in different banks.
using PartialStates = PartialState[17];
inline constexpr int kPartialUnitBytes = kTileRows * kHeadDimV * sizeof(float);
// Whole lines, so that every unit of every place is four of them.
inline constexpr int kPartialBytes =
    ceil_div<int>(kPartialUnitBytes + kTileRows / 16 * sizeof(PartialStates), 128) * 128;
// What a CTA remembers of a call with so many requests or fewer (memo.cuh).
inline constexpr int kMemoRequests = 256;
inline constexpr int kMemoBytes = kMemoRequests * 4 + 128;

}  // namespace flash_mla::cuda::decode_dense
