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

// A partial result: units of 512 bytes, the four accumulators of each lane of a warp for one tile
// of eight columns, [4 warps of 16 rows][32 tiles][left, right half][32 lanes][4] fp32, so that the
// units of the first 16 n rows come first; then the RowState of 64 rows.
inline constexpr int kUnitBytes = 512;
inline constexpr int kUnitsPerRowWarp = 64;
inline constexpr int kPartialFloats = kTileRows * kHeadDimV;
inline constexpr std::size_t kPartialBytes =
    kPartialFloats * sizeof(float) + kTileRows * sizeof(RowState);

}  // namespace flash_mla::cuda::decode_dense
