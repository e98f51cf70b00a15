// Properties of the planner (core/schedule.h), over shapes from one request to thousands.
#include "core/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace flash_mla {

static std::ostream& operator<<(std::ostream& stream, const ScheduleShape& shape) {
  return stream << "num_parts " << shape.num_parts << ", items_per_request "
                << shape.items_per_request << ", overhead " << shape.overhead << ", min_blocks "
                << shape.min_blocks << ", split " << shape.split;
}

namespace {

std::int64_t total_cost_of(const Schedule& schedule, const std::vector<std::int32_t>& lengths) {
  std::int64_t total = 0;
  for (const std::int32_t length : lengths) {
    total += std::int64_t{schedule.shape.items_per_request} *
             schedule.item_cost(schedule_blocks(length));
  }
  return total;
}

// Walks all items and parts and checks every promise of Schedule.
void check_parts(const Schedule& schedule, const std::vector<std::int32_t>& lengths) {
  const ScheduleShape& shape = schedule.shape;
  const std::int64_t total = total_cost_of(schedule, lengths);
  std::int64_t longest = 0;
  for (const std::int32_t length : lengths) {
    longest = std::max<std::int64_t>(longest, shape.overhead + schedule_blocks(length));
  }
  // The parts reach over all items.
  ASSERT_GE(schedule.part_begin(shape.num_parts), total);

  std::vector<std::int64_t> cost(shape.num_parts, 0);
  std::int64_t start = 0;
  for (const std::int32_t length : lengths) {
    const std::int32_t blocks = schedule_blocks(length);
    for (std::int32_t item = 0; item < shape.items_per_request; ++item) {
      // Parts whose range touches the item's, and some more on either side, which have to stay
      // away.
      const std::int64_t end = start + schedule.item_cost(blocks);
      const auto first = std::max<std::int64_t>((start - shape.overhead) / schedule.payload - 3, 0);
      const auto last = std::min<std::int64_t>(end / schedule.payload + 3, shape.num_parts - 1);
      std::int32_t next_block = 0, pieces = 0, count = -1, first_part = -1;
      for (auto part = static_cast<std::int32_t>(first); part <= last; ++part) {
        const Piece piece = schedule.piece(start, blocks, part);
        if (piece.empty()) continue;
        if (pieces == 0) {
          count = piece.count;
          first_part = part;
        }
        // Every block once, in order, by parts that stand side by side.
        ASSERT_EQ(piece.begin, next_block);
        ASSERT_EQ(piece.index, pieces);
        ASSERT_EQ(piece.count, count);
        ASSERT_EQ(piece.first_part, first_part);
        ASSERT_EQ(part, first_part + pieces);
        next_block = piece.end;
        ++pieces;
        cost[part] += shape.overhead + piece.end - piece.begin;
      }
      ASSERT_EQ(next_block, blocks);
      ASSERT_EQ(pieces, count);
      ASSERT_TRUE(shape.split || pieces == 1);
      start = end;
    }
  }
  ASSERT_EQ(start, total);
  const std::int64_t most = *std::max_element(cost.begin(), cost.end());
  // A part does its payload, and what undivided overheads add; unsplit, up to one item more.
  EXPECT_LE(most, schedule.payload + shape.overhead + (shape.split ? 0 : longest));
}

// Equal items and more of them than parts: the cuts may lie between them, and then nothing is
// split.
void check_aligned(Schedule schedule, const std::vector<std::int32_t>& lengths) {
  const std::int64_t items =
      static_cast<std::int64_t>(lengths.size()) * schedule.shape.items_per_request;
  const std::int32_t blocks = schedule_blocks(lengths.front());
  const std::int32_t payload = schedule.payload;
  schedule.align_to_items(items, schedule.item_cost(blocks));
  if (schedule.payload == payload) return;
  SCOPED_TRACE(testing::Message() << "aligned to items, payload " << schedule.payload);
  check_parts(schedule, lengths);
  for (std::int64_t item = 0; item < items; ++item) {
    const std::int64_t start = item * schedule.item_cost(blocks);
    const auto part = static_cast<std::int32_t>(start / schedule.payload);
    const Piece piece = schedule.piece(start, blocks, part);
    ASSERT_EQ(piece.begin, 0);
    ASSERT_EQ(piece.end, blocks);
    ASSERT_EQ(piece.count, 1);
  }
}

// The schedule of ranges, and where items may take whole parts, every such schedule.
void check_schedule(const ScheduleShape& shape, const std::vector<std::int32_t>& lengths) {
  SCOPED_TRACE(testing::Message() << shape << ", b " << lengths.size());
  std::int64_t total = 0, blocks = 0;
  for (const std::int32_t length : lengths) {
    total += Schedule::request_cost(shape, schedule_blocks(length));
    blocks += std::int64_t{shape.items_per_request} * schedule_blocks(length);
  }
  const Schedule ranges(shape, total);
  check_parts(ranges, lengths);
  if (!shape.split || lengths.empty()) return;
  const bool equal = std::all_of(lengths.begin(), lengths.end(), [&](std::int32_t length) {
    return schedule_blocks(length) == schedule_blocks(lengths.front());
  });
  if (equal) check_aligned(ranges, lengths);
  for (std::int32_t payload = ranges.least_whole_payload(blocks);
       payload <= ranges.payload + shape.overhead; ++payload) {
    std::int64_t pieces = 0;
    for (const std::int32_t length : lengths) {
      pieces += shape.items_per_request * ceil_div(schedule_blocks(length), payload);
    }
    if (!ranges.improved_by_whole_parts(payload, pieces)) continue;
    SCOPED_TRACE(testing::Message() << "whole parts of " << payload);
    const Schedule whole(shape, payload, true);
    ASSERT_EQ(whole.part_begin(static_cast<std::int32_t>(pieces)), total_cost_of(whole, lengths));
    check_parts(whole, lengths);
  }
}

std::vector<ScheduleShape> shapes() {
  std::vector<ScheduleShape> shapes;
  for (const int num_parts : {1, 2, 3, 66, 132}) {
    for (const int items_per_request : {1, 2, 7}) {
      for (const int overhead : {1, 2, 5}) {
        for (const int min_blocks : {1, 2, 8}) {
          for (const bool split : {true, false}) {
            shapes.push_back({.num_parts = num_parts,
                              .items_per_request = items_per_request,
                              .overhead = overhead,
                              .min_blocks = min_blocks,
                              .split = split});
          }
        }
      }
    }
  }
  return shapes;
}

void check_all_shapes(const std::vector<std::int32_t>& lengths) {
  for (const ScheduleShape& shape : shapes()) {
    check_schedule(shape, lengths);
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(Divider, DividesAsTheProcessorDoes) {
  std::mt19937 random(3);
  std::vector<std::int32_t> numbers = {
      0, 1, 2, 3, 63, 64, 65, 66, 132, 1 << 30, INT32_MAX - 1, INT32_MAX};
  for (int i = 0; i < 2000; ++i)
    numbers.push_back(static_cast<std::int32_t>(random() >> (1 + i % 31)));
  for (const std::int32_t divisor : numbers) {
    if (divisor == 0) continue;
    const Divider divider(divisor);
    for (const std::int32_t n : numbers) {
      ASSERT_EQ(divider.quotient(n), n / divisor) << n << " / " << divisor;
      ASSERT_EQ(divider.ceil_quotient(n), n / divisor + (n % divisor > 0)) << n << " / " << divisor;
      ASSERT_EQ(divider.ceil_quotient(-n), -(n / divisor)) << -n << " / " << divisor;
    }
  }
}

// 128 rows on 66 pairs of CTAs.
ScheduleShape shape_of_pairs() {
  ScheduleShape shape = {
      .num_parts = 66, .overhead = 2, .min_blocks = 2, .levels = kTileLevels, .rows = 128};
  for (int level = 0; level < kTileLevels; ++level)
    shape.chunks_at[level] = shape.items_at[level] = 1 << level;
  return shape;
}

std::int32_t level_of(const ScheduleShape& shape, std::int32_t b, std::int32_t blocks) {
  std::uint32_t least = ~0u;
  for (int level = 0; level < 32; ++level)
    least = std::min(least, shape.level_cost(level, b, b * blocks, blocks));
  return static_cast<std::int32_t>(least & 7);
}

TEST(Schedule, TilesAreCutFinerWhereTheMergeCostsMoreThanThePages) {
  const ScheduleShape shape = shape_of_pairs();
  EXPECT_EQ(level_of(shape, 1, 1), 0);  // nothing to merge
  EXPECT_EQ(level_of(shape, 1, 16), 2);
  EXPECT_EQ(level_of(shape, 1, 64), 1);
  EXPECT_EQ(level_of(shape, 1, 256), 0);
  EXPECT_EQ(level_of(shape, 1, 2048), 0);
  EXPECT_EQ(level_of(shape, 33, 3), 1);
  EXPECT_EQ(level_of(shape, 34, 3), 0);  // no part has two items
  EXPECT_EQ(level_of(shape, 1, 1 << 29), 0);
  ScheduleShape only = shape;
  only.levels = 1;
  EXPECT_EQ(level_of(only, 1, 16), 0);
}

TEST(Schedule, EveryLevelCoversEverything) {
  for (int level = 0; level < kTileLevels; ++level) {
    const ScheduleShape shape = shape_of_pairs().at_level(level);
    EXPECT_EQ(shape.items_per_request * (kTileRowsAtMost >> level) * 2, 128);
    for (const int length : {1, 64, 1000, 4096, 100000}) check_schedule(shape, {length});
    check_schedule(shape, {1000, 0, 50, 4096, 4096});
  }
}

TEST(Schedule, BlocksOfARequest) {
  EXPECT_EQ(schedule_blocks(0), 1);
  EXPECT_EQ(schedule_blocks(-5), 1);
  EXPECT_EQ(schedule_blocks(1), 1);
  EXPECT_EQ(schedule_blocks(64), 1);
  EXPECT_EQ(schedule_blocks(65), 2);
  EXPECT_EQ(schedule_blocks(131072), 2048);
}

TEST(Schedule, NoRequest) {
  for (const ScheduleShape& shape : shapes()) {
    const Schedule schedule(shape, 0);
    EXPECT_GE(schedule.payload, 1);
  }
}

TEST(Schedule, OneRequest) {
  for (const int length : {0, 1, 63, 64, 65, 128, 129, 1000, 4096, 131072, 1000000}) {
    check_all_shapes({length});
  }
}

TEST(Schedule, EmptyRequests) {
  check_all_shapes(std::vector<std::int32_t>(300, 0));
  check_all_shapes({0, 5000, 0, 0, 64, 0});
  check_all_shapes({5000, 0, 0, 0, 0, 0, 0, 0});
}

TEST(Schedule, RandomBatches) {
  std::mt19937 random(1);
  for (int draw = 0; draw < 60; ++draw) {
    const int b = std::uniform_int_distribution<int>(1, draw % 10 == 0 ? 3000 : 200)(random);
    const int longest = 1 << std::uniform_int_distribution<int>(0, 17)(random);
    std::vector<std::int32_t> lengths(b);
    for (std::int32_t& length : lengths) {
      length = std::uniform_int_distribution<int>(0, longest)(random);
    }
    check_all_shapes(lengths);
  }
}

TEST(Schedule, OneLongAmongMany) {
  std::vector<std::int32_t> lengths(500, 64);
  for (const std::size_t place : {0, 250, 499}) {
    lengths[place] = 131072;
    check_all_shapes(lengths);
    lengths[place] = 64;
  }
}

}  // namespace
}  // namespace flash_mla
