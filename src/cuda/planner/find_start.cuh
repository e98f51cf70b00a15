// Finds, inside a CTA, the request in which a part of the schedule starts (core/schedule.h): the
// first thing a persistent CTA does, so latency counts. Prefix sums over the lengths on two levels:
//
//   1. each warp owns a contiguous range of requests, loads their lengths (coalesced, kRows loads
//      per lane in flight) and sums their costs with redux.sync;
//   2. after one barrier every thread knows all warp sums, and so the schedule and the warp whose
//      range the part starts in;
//   3. that warp finds the request with one scan over 32 lengths it still holds; a second barrier
//      publishes it.
//
// Up to kThreads requests cost one load per lane, up to kRows * kThreads one batch of loads; beyond
// that the owning warp reads its range again. No atomics, no global memory: two CTAs agree because
// they compute the same thing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/schedule.h"

namespace flash_mla::cuda {

// Longest request that a block table of `max_pages` columns allows, held below 2^31 - 64 so that
// rounding up to blocks is safe.
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

template <int kThreads>
struct FindStartScratch {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  std::int64_t warp_cost[kThreads / 32];
  Start start;
};

// Schedule::part_begin(part) lies in the range [request_start_cost, request_start_cost + cost of
// the request) of the request returned. The part's first piece may be in a later item: a part can
// begin in the overhead of one, and without splitting (!shape.split) it only has items that begin
// in it.
//
// All kThreads threads of the CTA (one-dimensional) call it together with equal arguments and get
// equal results. cache_seqlens is [b], lengths are clamped to 0 .. max_len (max_seqlen()).
// `schedule` is overwritten. `scratch` is shared memory; a __syncthreads() must lie between the
// call and the next use of that memory.
template <int kThreads>
__device__ Start find_start(const std::int32_t* cache_seqlens, std::int32_t b, std::int32_t max_len,
                            const ScheduleShape& shape, std::int32_t part, Schedule& schedule,
                            FindStartScratch<kThreads>& scratch) {
  constexpr int kWarps = kThreads / 32;
  constexpr int kRows = 4;  // lengths a lane holds: 32 requests side by side make a row
  constexpr std::uint32_t kAllLanes = 0xffffffff;
  const std::int32_t lane = threadIdx.x % 32;
  const std::int32_t warp = threadIdx.x / 32;
  const std::int32_t warp_requests = (b + kThreads - 1) / kThreads * 32;
  const std::int32_t warp_end = min(b, (warp + 1) * warp_requests);

  // A row's costs, summed, stay below 2^31: a request has at most 2^25 blocks.
  std::int32_t seqlens[kRows];
  const auto load = [&](std::int32_t first) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const std::int32_t request = first + row * 32 + lane;
      seqlens[row] = request < warp_end ? cache_seqlens[request] : -1;
    }
  };
  const auto unit_cost = [&](std::int32_t first, int row) -> std::uint32_t {
    if (first + row * 32 + lane >= warp_end) return 0;
    return shape.overhead + schedule_blocks(clamp_seqlen(seqlens[row], max_len));
  };
  const auto row_cost = [&](std::int32_t first, int row) -> std::int64_t {
    return static_cast<std::int64_t>(__reduce_add_sync(kAllLanes, unit_cost(first, row))) *
           shape.items_per_request;
  };

  std::int32_t first = warp * warp_requests;
  std::int64_t warp_cost = 0;
  for (std::int32_t at = first; at < warp_end; at += kRows * 32) {
    load(at);
#pragma unroll
    for (int row = 0; row < kRows; ++row) warp_cost += row_cost(at, row);
  }
  if (lane == 0) scratch.warp_cost[warp] = warp_cost;
  __syncthreads();

  std::int64_t total = 0, before_warp = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i == warp) before_warp = total;
    total += scratch.warp_cost[i];
  }
  schedule = Schedule(shape, total);
  const std::int64_t position = schedule.part_begin(part);

  if (position >= total) {
    if (threadIdx.x == 0) scratch.start = {b, 0, total};
  } else if (position >= before_warp && position < before_warp + warp_cost) {
    std::int64_t cost = before_warp;  // of all requests before the row looked at
    if (warp_requests > kRows * 32) {
      for (;; first += kRows * 32) {
        load(first);
        std::int64_t batch_cost = 0;
#pragma unroll
        for (int row = 0; row < kRows; ++row) batch_cost += row_cost(first, row);
        if (position < cost + batch_cost) break;
        cost += batch_cost;
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const std::int64_t next_row = cost + row_cost(first, row);
      if (cost <= position && position < next_row) {
        const std::uint32_t own = unit_cost(first, row);
        std::uint32_t up_to = own;  // inclusive scan over the row
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
          const std::uint32_t left = __shfl_up_sync(kAllLanes, up_to, distance);
          if (lane >= distance) up_to += left;
        }
        const std::int64_t end = cost + static_cast<std::int64_t>(up_to) * shape.items_per_request;
        const std::int64_t begin = end - static_cast<std::int64_t>(own) * shape.items_per_request;
        if (begin <= position && position < end) {
          scratch.start = {first + row * 32 + lane, clamp_seqlen(seqlens[row], max_len), begin};
        }
      }
      cost = next_row;
    }
  }
  __syncthreads();
  return scratch.start;
}

}  // namespace flash_mla::cuda
