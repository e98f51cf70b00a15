// Finds the request in which a part of the schedule starts (core/schedule.h): the first thing a
// persistent CTA does, so latency counts. Prefix sums over the lengths on two levels, by a team of
// warps:
//
//   1. each warp owns a contiguous range of requests, loads their lengths (coalesced, kRows loads
//      per lane in flight) and sums their costs with redux.sync;
//   2. after one barrier every thread knows all warp sums, and so the schedule and the warp whose
//      range the part starts in;
//   3. that warp finds the request with one scan over 32 lengths it still holds; a second barrier
//      publishes it.
//
// Where items may take whole parts, step 2 includes a search, by all warps, for the least payload
// with which they do, and one more barrier.
//
// Where requests are few (kFewRequests), a warp does it alone, a lane for each request: no shared
// memory, and little code, which a short decode waits for.
//
// No atomics, no global memory: two CTAs agree because they compute the same thing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/schedule.h"
#include "cuda/ptx/sync.cuh"

namespace flash_mla::cuda {

// Payloads that are tried for whole parts.
inline constexpr int kWholePayloads = 16;

// kThreads threads side by side that start at a multiple of kThreads; they meet at named barrier
// kBarrier.
template <int kThreads_, int kBarrier>
struct Team {
  static constexpr int kThreads = kThreads_;
  static constexpr int kWarps = kThreads / 32;
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  __device__ __forceinline__ static void meet() { ptx::named_barrier_sync(kBarrier, kThreads); }
};

// Longest request that a block table of `max_pages` columns allows, a multiple of 64 below 2^31, so
// that rounding up to blocks is safe.
__host__ __device__ __forceinline__ std::int32_t max_seqlen(std::int32_t max_pages) {
  constexpr std::int32_t kMostPages = INT32_MAX / kBlockTokens;
  return (max_pages < kMostPages ? max_pages : kMostPages) * kBlockTokens;
}

// A length as the schedule sees it, whatever the tensor says.
__device__ __forceinline__ std::int32_t clamp_seqlen(std::int32_t seqlen, std::int32_t max_len) {
  return min(max(seqlen, 0), max_len);
}

struct Start {
  std::int32_t request;             // b when the part starts past the last request: it has no work
  std::int32_t seqlen;              // its length, clamped; 0 when request is b
  std::int64_t request_start_cost;  // cost of all requests before it
};

template <typename Team>
struct FindStartScratch {
  std::uint32_t warp_units[Team::kWarps];  // costs, of one item of each request
  std::uint32_t warp_most[Team::kWarps];   // the largest of them
  std::int32_t whole[Team::kWarps];        // payloads with which items take whole parts, or 0
  Start start;
};

// Schedule::part_begin(part) lies in the range [request_start_cost, request_start_cost + cost of
// the request) of the request returned. The part's first piece may be in a later item: a part can
// begin in the overhead of one, and without splitting (!shape.split) it only has items that begin
// in it.
//
// All threads of the team call it together with equal arguments and get equal results.
// cache_seqlens is [b], lengths are clamped to 0 .. max_len (max_seqlen()). `schedule` is
// overwritten. `scratch` is shared memory; the team must meet before that memory is used again.
template <typename Team>
__device__ Start find_start(const std::int32_t* cache_seqlens, std::int32_t b, std::int32_t max_len,
                            const ScheduleShape& any_level, std::int32_t part, Schedule& schedule,
                            FindStartScratch<Team>& scratch) {
  constexpr int kThreads = Team::kThreads, kWarps = Team::kWarps;
  constexpr int kRows = 4;  // lengths a lane has in flight: 32 requests side by side make a row
  constexpr std::uint32_t kAllLanes = 0xffffffff;
  const std::int32_t lane = threadIdx.x % 32;
  const std::int32_t warp = threadIdx.x % kThreads / 32;
  const std::int32_t warp_requests = (b + kThreads - 1) / kThreads * 32;
  const std::int32_t warp_begin = warp * warp_requests;
  const std::int32_t warp_end = min(b, warp_begin + warp_requests);

  // Costs of one item of the requests; at most kMostScheduleCost all together.
  const auto unit_cost = [&](std::int32_t seqlen) -> std::uint32_t {
    return any_level.overhead + schedule_blocks(clamp_seqlen(seqlen, max_len));
  };
  std::uint32_t units = 0, most = 0;
#pragma unroll 1
  for (std::int32_t at = warp_begin + lane; at < warp_end; at += kRows * 32) {
    std::int32_t seqlens[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (at + row * 32 < warp_end) seqlens[row] = cache_seqlens[at + row * 32];
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (at + row * 32 < warp_end) {
        const std::uint32_t unit = unit_cost(seqlens[row]);
        units += unit;
        most = max(most, unit);
      }
    }
  }
  units = __reduce_add_sync(kAllLanes, units);
  most = __reduce_max_sync(kAllLanes, most);
  if (lane == 0) {
    scratch.warp_units[warp] = units;
    scratch.warp_most[warp] = most;
  }
  Team::meet();

  std::uint32_t total = 0, before = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i == warp) before = total;
    total += scratch.warp_units[i];
    most = max(most, scratch.warp_most[i]);
  }
  std::int32_t level = 0;
  if (any_level.levels > 1) {  // a lane for each
    const std::uint32_t cost =
        any_level.level_cost(lane, b, total - b * any_level.overhead,
                             static_cast<std::int32_t>(most) - any_level.overhead);
    level = static_cast<std::int32_t>(__reduce_min_sync(kAllLanes, cost) & 7);
  }
  const ScheduleShape shape = any_level.at_level(level);
  schedule = Schedule(shape, static_cast<std::int64_t>(total) * shape.items_per_request);
  bool mine = true;  // this warp's range holds the part's begin, if any does
  const std::int64_t items = static_cast<std::int64_t>(b) * shape.items_per_request;
  if (shape.split && items > shape.num_parts) {
    if (total == b * most) schedule.align_to_items(items, most);
  } else if (shape.split) {
    // The warps share the payloads to try; the least that does it counts.
    const std::int64_t blocks =
        static_cast<std::int64_t>(total - b * shape.overhead) * shape.items_per_request;
    const std::int32_t least = schedule.least_whole_payload(blocks);
    const std::int32_t most_tries =
        min(kWholePayloads, schedule.payload + shape.overhead - least + 1);
    std::int32_t found = 0;
#pragma unroll 1
    for (int i = warp; i < most_tries && found == 0; i += kWarps) {
      const Divider payload(least + i);
      std::int32_t pieces = 0;
#pragma unroll 1
      for (std::int32_t at = lane; at < b; at += 32) {
        pieces += payload.ceil_quotient(schedule_blocks(clamp_seqlen(cache_seqlens[at], max_len)));
      }
      pieces = __reduce_add_sync(kAllLanes, pieces) * shape.items_per_request;
      if (schedule.improved_by_whole_parts(least + i, pieces)) found = least + i;
    }
    if (lane == 0) scratch.whole[warp] = found;
    Team::meet();
#pragma unroll 1
    for (int i = 0; i < kWarps; ++i) {
      const std::int32_t payload = scratch.whole[i];
      if (payload > 0 && (found == 0 || payload < found)) found = payload;
    }
    if (found > 0) schedule = Schedule(shape, found, true);
  }
  std::int32_t first = warp_begin, last = warp_end;
  if (schedule.whole_parts) {
    // Costs are others now, and requests few: one warp goes through them all.
    mine = warp == 0;
    before = 0;
    first = 0;
    last = b;
  }
  // In costs of one item of each request.
  const auto position = static_cast<std::uint32_t>(
      shape.items_per_request.quotient(static_cast<std::int32_t>(schedule.part_begin(part))));
  if (!schedule.whole_parts) {
    mine = position >= total ? warp == 0 : position >= before && position < before + units;
    if (position >= total) first = last;
  }
  if (mine) {
    if (lane == 0) scratch.start = {b, 0, 0};
    __syncwarp();
    // The lengths are in the cache now; one row at a time keeps the code, which every launch
    // fetches anew, short.
#pragma unroll 1
    for (std::int32_t row = first; row < last && before <= position; row += 32) {
      const std::int32_t at = row + lane;
      const std::int32_t seqlen = at < last ? clamp_seqlen(cache_seqlens[at], max_len) : 0;
      const std::uint32_t own = at < last ? schedule.item_cost(schedule_blocks(seqlen)) : 0;
      std::uint32_t up_to = own;  // inclusive scan over the row
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const std::uint32_t left = __shfl_up_sync(kAllLanes, up_to, distance);
        if (lane >= distance) up_to += left;
      }
      const std::uint32_t start = before + up_to - own;
      if (start <= position && position < start + own) {
        scratch.start = {at, seqlen, static_cast<std::int64_t>(start) * shape.items_per_request};
      }
      before += __shfl_sync(kAllLanes, up_to, 31);
    }
  }
  Team::meet();
  return scratch.start;
}

inline constexpr std::int32_t kFewRequests = 32;

// The same by one warp, for at most kFewRequests requests. `lane_seqlen` is the length of request
// `lane`, anything where there is none.
__device__ __forceinline__ Start find_start_of_few(std::int32_t lane_seqlen, std::int32_t b,
                                                   std::int32_t max_len,
                                                   const ScheduleShape& any_level,
                                                   std::int32_t part, Schedule& schedule) {
  constexpr std::uint32_t kAllLanes = 0xffffffff;
  const std::int32_t lane = threadIdx.x % 32;
  const std::int32_t seqlen = lane < b ? clamp_seqlen(lane_seqlen, max_len) : 0;
  const std::int32_t blocks = lane < b ? schedule_blocks(seqlen) : 0;
  const std::int32_t total = __reduce_add_sync(kAllLanes, blocks);
  const std::int32_t most = __reduce_max_sync(kAllLanes, blocks);
  std::int32_t level = 0;
  if (any_level.levels > 1) {  // a lane for each
    level = static_cast<std::int32_t>(
        __reduce_min_sync(kAllLanes, any_level.level_cost(lane, b, total, most)) & 7);
  }
  const ScheduleShape shape = any_level.at_level(level);
  const std::int32_t items = b * shape.items_per_request;
  schedule = Schedule(shape, total * shape.items_per_request + items * shape.overhead);
  if (shape.split && items > shape.num_parts) {
    if (total == b * most) schedule.align_to_items(items, most + shape.overhead);
  } else if (shape.split) {
    const std::int32_t least = schedule.least_whole_payload(total * shape.items_per_request);
    const std::int32_t tries = min(kWholePayloads, schedule.payload + shape.overhead - least + 1);
#pragma unroll 1
    for (std::int32_t payload = least; payload < least + tries; ++payload) {
      const std::int32_t pieces = __reduce_add_sync(kAllLanes, ceil_div(blocks, payload));
      if (schedule.improved_by_whole_parts(payload, pieces * shape.items_per_request)) {
        schedule = Schedule(shape, payload, true);
        break;
      }
    }
  }
  // In costs of one item of each request.
  const std::int32_t position =
      shape.items_per_request.quotient(static_cast<std::int32_t>(schedule.part_begin(part)));
  const std::int32_t own = lane < b ? schedule.item_cost(blocks) : 0;
  std::int32_t start = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const std::int32_t left = __shfl_up_sync(kAllLanes, start, distance);
    if (lane >= distance) start += left;
  }
  start -= own;
  const std::uint32_t here = __ballot_sync(kAllLanes, start <= position && position < start + own);
  if (here == 0) return {b, 0, 0};
  const std::int32_t request = __ffs(static_cast<int>(here)) - 1;
  return {
      request, __shfl_sync(kAllLanes, seqlen, request),
      static_cast<std::int64_t>(__shfl_sync(kAllLanes, start, request)) * shape.items_per_request};
}

}  // namespace flash_mla::cuda
