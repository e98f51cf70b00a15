// The planner: how a decode is cut into parts of equal cost. Pure arithmetic, the same on the host
// and on a GPU.
//
// The query rows of one (request, kv head) are cut into row groups (of 64 rows, or of 128 for a
// pair of CTAs). `team` groups work side by side on the same pages, so that the second reader of a
// page finds it in L2; team groups of one (request, kv head) make one *item*. Items stand in a row:
// request, then kv head, then chunk of groups. Each costs `overhead` plus its blocks (64 tokens),
// and the row is cut into `num_parts` ranges of `payload` cost each. Because the cut is a closed
// form of the item's start and length, every CTA finds its own range, and who shares an item with
// it, without talking to anybody.
//
// A part that begins or ends inside an item pays for it: another overhead, and a partial result to
// write and to merge. Where all items are equal and there are more of them than parts, the cuts are
// therefore laid between items when that makes a part longer by no more than two overheads
// (align_to_items).
//
// Where requests are few and split among many parts, the merge costs as much as the pages do. Row
// groups may then be cut finer: tiles of 32 or 16 rows instead of 64 read every page two or four
// times, from L2, but leave partial results of half or a quarter the size (`level`).
//
// A part that ends one item and begins the next pays the overhead twice. Where there are no more
// items than parts, the planner therefore looks for a payload with which every item takes whole
// parts (`whole_parts`), and no part has two.
#pragma once

#include <cstdint>

#include "core/divider.h"

namespace flash_mla {

inline constexpr int kBlockTokens = 64;
inline constexpr int kTileRowsAtMost = 64;  // query rows of a CTA
inline constexpr int kTileLevels = 3;       // tiles of 64, 32 or 16 rows
// With more blocks than this, of all requests together, tiles are never cut finer.
inline constexpr int kFineTileBlocks = 1 << 14;
// The cost of all items together must stay below this: the arithmetic is in 32 bits.
inline constexpr std::int64_t kMostScheduleCost = 1 << 30;

// How a shape maps on the card: depends on shapes and the device only, never on lengths.
struct ScheduleShape {
  Divider num_parts = 1;          // ranges the row of items is cut into
  Divider team = 1;               // row groups that work side by side on one part
  Divider chunks = 1;             // ceil(row groups / team)
  Divider items_per_request = 1;  // h_kv * chunks
  std::int32_t overhead = 1;      // cost of an item besides its blocks, in blocks
  std::int32_t min_blocks = 1;    // a part takes at least this many blocks
  bool split = true;
  std::int32_t level = 0;   // tiles have kTileRowsAtMost >> level rows
  std::int32_t levels = 1;  // that may be chosen from
  std::int32_t rows = 1;    // query rows of a (request, kv head)
  Divider chunks_at[kTileLevels] = {},
          items_at[kTileLevels] = {};  // chunks, items_per_request at each level

  // The same at another level.
  [[nodiscard]] FLASH_MLA_HOST_DEVICE ScheduleShape at_level(std::int32_t other) const {
    ScheduleShape shape = *this;
    if (other == 0) return shape;
    shape.level = other;
    shape.chunks = chunks_at[other];
    shape.items_per_request = items_at[other];
    if (other == kTileLevels - 1) shape.min_blocks = 1;
    return shape;
  }

  // How long a part takes at a level, in blocks, roughly: its share of the blocks, and the merge,
  // which is as long as a block for every 16 rows of a tile. `blocks`: of one item of each request,
  // all together; `most`: of the longest request. The lowest three bits are the level.
  [[nodiscard]] FLASH_MLA_HOST_DEVICE std::uint32_t level_cost(std::int32_t at, std::int32_t b,
                                                               std::int32_t blocks,
                                                               std::int32_t most) const {
    constexpr std::uint32_t kNever = ~0u;
    if (at >= levels) return kNever;
    const ScheduleShape shape = at_level(at);
    if (at > 0 &&
        (blocks > kFineTileBlocks || b > num_parts || b * shape.items_per_request > num_parts)) {
      return kNever;
    }
    std::int32_t share = num_parts.ceil_quotient(blocks * shape.items_per_request);
    if (share < shape.min_blocks) share = shape.min_blocks < most ? shape.min_blocks : most;
    const std::int32_t tile = kTileRowsAtMost >> at < rows ? kTileRowsAtMost >> at : rows;
    const std::int32_t merge = most > share ? (tile + 15) / 16 : 0;
    return static_cast<std::uint32_t>(share + merge) << 3 | static_cast<std::uint32_t>(at);
  }
};

// A run of blocks of one item, done by one part.
struct Piece {
  std::int32_t begin = 0, end = 0;    // blocks
  std::int32_t index = 0, count = 1;  // this is piece `index` of the `count` the item is cut into
  std::int32_t first_part = 0;        // part that does piece 0
  [[nodiscard]] FLASH_MLA_HOST_DEVICE bool empty() const { return begin >= end; }
};

// Rounded towards plus infinity, of a negative x too; y > 0.
template <typename T>
FLASH_MLA_HOST_DEVICE constexpr T ceil_div(T x, T y) {
  return x > 0 ? (x + y - 1) / y : x / y;
}

// Blocks of a request. An empty one counts as one block, so that exactly one part writes its
// (empty) result.
FLASH_MLA_HOST_DEVICE std::int32_t schedule_blocks(std::int32_t seqlen) {
  return seqlen <= 0 ? 1 : (seqlen + kBlockTokens - 1) / kBlockTokens;
}

struct Schedule {
  ScheduleShape shape;
  Divider payload = 1;       // cost of one part
  bool whole_parts = false;  // an item's cost is its blocks alone, rounded up to whole parts

  // `total_cost` is the sum of item_cost() over all items, the first one's overhead included; below
  // kMostScheduleCost.
  FLASH_MLA_HOST_DEVICE Schedule(const ScheduleShape& shape_in, std::int64_t total_cost)
      : shape(shape_in) {
    const std::int32_t share =
        shape.num_parts.ceil_quotient(static_cast<std::int32_t>(total_cost) - shape.overhead);
    payload = share > shape.min_blocks ? share : shape.min_blocks;
  }

  // The schedule whose payload is known already.
  FLASH_MLA_HOST_DEVICE Schedule(const ScheduleShape& shape_in, Divider payload_in,
                                 bool whole_parts_in)
      : shape(shape_in), payload(payload_in), whole_parts(whole_parts_in) {}

  // Lays the cuts between items, all of which cost `cost`, when that costs no more than cutting
  // them.
  FLASH_MLA_HOST_DEVICE void align_to_items(std::int64_t items, std::int32_t cost) {
    const std::int64_t aligned =
        std::int64_t{shape.num_parts.ceil_quotient(static_cast<std::int32_t>(items))} * cost;
    if (aligned <= payload + 2 * shape.overhead) payload = static_cast<std::int32_t>(aligned);
  }

  // Whether items that take `pieces` parts of `whole_payload` blocks all together fit, and take no
  // longer than this schedule.
  [[nodiscard]] FLASH_MLA_HOST_DEVICE bool improved_by_whole_parts(std::int32_t whole_payload,
                                                                   std::int64_t pieces) const {
    return pieces <= shape.num_parts && whole_payload <= payload + shape.overhead;
  }
  // The least whole payload that may fit; at least min_blocks.
  [[nodiscard]] FLASH_MLA_HOST_DEVICE std::int32_t least_whole_payload(
      std::int64_t total_blocks) const {
    const std::int32_t payload_of_blocks =
        shape.num_parts.ceil_quotient(static_cast<std::int32_t>(total_blocks));
    return payload_of_blocks > shape.min_blocks ? payload_of_blocks : shape.min_blocks;
  }

  FLASH_MLA_HOST_DEVICE static std::int64_t request_cost(const ScheduleShape& shape,
                                                         std::int32_t blocks) {
    return static_cast<std::int64_t>(shape.items_per_request) * (shape.overhead + blocks);
  }
  [[nodiscard]] FLASH_MLA_HOST_DEVICE std::int32_t item_cost(std::int32_t blocks) const {
    return whole_parts ? payload.ceil_quotient(blocks) * payload : shape.overhead + blocks;
  }

  // Where a part begins in the row of items. Every part has an overhead of its own when it begins
  // inside an item; that of the first item is left out, so that a single long item is cut evenly.
  [[nodiscard]] FLASH_MLA_HOST_DEVICE std::int64_t part_begin(std::int32_t part) const {
    return static_cast<std::int64_t>(part) * payload + (whole_parts ? 0 : shape.overhead);
  }

  // What part `part` does of the item that starts at cost `start` and has `blocks` blocks; may be
  // empty.
  [[nodiscard]] FLASH_MLA_HOST_DEVICE Piece piece(std::int64_t start, std::int32_t blocks,
                                                  std::int32_t part) const {
    return piece_from(static_cast<std::int32_t>(start - part_begin(part)), blocks, part);
  }
  // The same for an item that starts `relative` after the part's begin, or before it when negative.
  [[nodiscard]] FLASH_MLA_HOST_DEVICE Piece piece_from(std::int32_t relative, std::int32_t blocks,
                                                       std::int32_t part) const {
    Piece piece;
    if (whole_parts) {
      piece.begin = clamped(-relative, blocks);
      piece.end = clamped(payload - relative, blocks);
      piece.index = payload.ceil_quotient(-relative);
      piece.count = payload.ceil_quotient(blocks);
      piece.first_part = part - piece.index;
      return piece;
    }
    piece.begin = part == 0 ? 0 : blocks_before(-relative, blocks);
    piece.end = blocks_before(payload - relative, blocks);
    if (!shape.split) {
      piece.first_part = part;  // of the one part whose piece is not empty
      return piece;
    }
    // The first part whose end lies past the first cut, and the part whose end lies past the last
    // block.
    const std::int32_t begin = relative + shape.overhead;
    piece.index = 1 - payload.ceil_quotient(begin + 1);
    piece.count = payload.ceil_quotient(begin + blocks) + piece.index;
    piece.first_part = part - piece.index;
    return piece;
  }

 private:
  FLASH_MLA_HOST_DEVICE static std::int32_t clamped(std::int32_t x, std::int32_t most) {
    return x < 0 ? 0 : (x > most ? most : x);
  }

  // Blocks of an item that lie before cost `y`, counted from the item's start.
  [[nodiscard]] FLASH_MLA_HOST_DEVICE std::int32_t blocks_before(std::int32_t y,
                                                                 std::int32_t blocks) const {
    if (!shape.split) return y > 0 ? blocks : 0;
    const std::int32_t inside = y - shape.overhead;
    if (inside >= blocks) return blocks;
    return inside <= 0 ? 0 : inside;
  }
};

}  // namespace flash_mla
