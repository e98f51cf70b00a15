// plan_decode: writes down, for callers who want to see or cache it, the schedule that every CTA of
// a decode finds for itself.
//
// One CTA: prefix sums of the requests' costs (CUB block scans over tiles of kThreads requests)
// give every request its start; the thread that holds a request notes which parts start in it, and
// counts the pieces it is cut into; then one thread a part writes the part's row. The schedule is a
// closed form of these starts: core/schedule.h.
//
// metadata[p] = {first request, first block, last request, end block, split index, 0, 0, 0}:
//   requests of part p's first and last piece; the block the first piece begins with and one past
//   the last piece's, counted within the item where a request has several; index of the first piece
//   among those its item is cut into. A part without work has {b, 0, 0, 0, 0, 0, 0, 0}.
// num_splits[i]: pieces of all items of the requests before i.
//
// A plan that splits nothing has one part with everything and one piece a request.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "cuda/common/device_guard.h"
#include "cuda/common/error.h"
#include "cuda/cuda.h"
#include "cuda/planner/find_start.cuh"

namespace flash_mla::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kMaxParts = kThreads;  // a thread writes one row; parts are at most the SMs of a card

struct PlanArgs {
  const std::int32_t* cache_seqlens;  // [b]
  std::int32_t b;
  std::int32_t max_len;      // lengths are clamped to 0 .. max_len
  ScheduleShape shape;       // num_parts is the plan's
  std::int32_t* metadata;    // [num_parts, 8]
  std::int32_t* num_splits;  // [b + 1]
};

__device__ void write_row(std::int32_t* metadata, std::int32_t part, std::int32_t first_request,
                          std::int32_t first_block, std::int32_t last_request,
                          std::int32_t end_block, std::int32_t split_index) {
  std::int32_t* row = metadata + static_cast<std::int64_t>(part) * kPlanRowInts;
  row[0] = first_request;
  row[1] = first_block;
  row[2] = last_request;
  row[3] = end_block;
  row[4] = split_index;
  row[5] = row[6] = row[7] = 0;
}

__device__ std::int32_t blocks_of(const PlanArgs& args, std::int32_t request) {
  return schedule_blocks(clamp_seqlen(args.cache_seqlens[request], args.max_len));
}

// The item in which a part starts.
struct Item {
  std::int64_t start_cost;
  std::int32_t blocks;
  std::int32_t index;  // within the request
};

__device__ Item item_at(const Schedule& schedule, const Start& start, std::int64_t position) {
  const std::int32_t blocks = schedule_blocks(start.seqlen);
  const std::int64_t cost = schedule.item_cost(blocks);
  const std::int64_t index = (position - start.request_start_cost) / cost;
  return {start.request_start_cost + index * cost, blocks, static_cast<std::int32_t>(index)};
}

// `starts` holds the request of every part that begins before `total`, the cost of everything.
__device__ void write_part(const PlanArgs& args, const Schedule& schedule, const Start* starts,
                           std::int64_t total, std::int32_t part) {
  const std::int64_t begin = schedule.part_begin(part);
  const std::int64_t end = schedule.part_begin(part + 1);
  if (begin >= total) {
    write_row(args.metadata, part, args.b, 0, 0, 0, 0);
    return;
  }
  const Item item = item_at(schedule, starts[part], begin);
  const Piece piece = schedule.piece(item.start_cost, item.blocks, part);
  if (piece.empty()) {  // the part ends within the overhead of the item it begins in
    write_row(args.metadata, part, args.b, 0, 0, 0, 0);
    return;
  }
  std::int32_t last_request = args.b - 1;
  std::int32_t end_block = 0;
  if (end < total) {  // the part ends where the next one begins
    const Item next = item_at(schedule, starts[part + 1], end);
    last_request = starts[part + 1].request;
    end_block = schedule.piece(next.start_cost, next.blocks, part + 1).begin;
    if (end_block == 0) {  // at the start of an item: the last piece is the end of the item before
      if (next.index == 0) --last_request;
      end_block = next.index == 0 ? blocks_of(args, last_request) : next.blocks;
    }
  } else {
    end_block = blocks_of(args, last_request);
  }
  write_row(args.metadata, part, starts[part].request, piece.begin, last_request, end_block,
            piece.index);
}

__global__ void __launch_bounds__(kThreads) plan_split(const __grid_constant__ PlanArgs args) {
  using CostScan = cub::BlockScan<std::int64_t, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  using PieceScan = cub::BlockScan<std::int32_t, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  using AllThreads = Team<kThreads, 0>;
  __shared__ FindStartScratch<AllThreads> find_start_scratch;
  __shared__ typename CostScan::TempStorage cost_scan;
  __shared__ typename PieceScan::TempStorage piece_scan;
  __shared__ Start starts[kMaxParts];

  Schedule schedule(args.shape, 0);
  find_start<AllThreads>(args.cache_seqlens, args.b, args.max_len, args.shape, 0, schedule,
                         find_start_scratch);
  __syncthreads();

  std::int64_t tile_cost = 0;  // of all requests before the tile; after the loop, of everything
  std::int32_t tile_pieces = 0;
  // The two scans take turns, so each one's barriers protect the other's storage.
  for (std::int32_t tile = 0; tile < args.b; tile += kThreads) {
    const std::int32_t request = tile + static_cast<std::int32_t>(threadIdx.x);
    const bool exists = request < args.b;
    const std::int32_t seqlen =
        exists ? clamp_seqlen(args.cache_seqlens[request], args.max_len) : 0;
    const std::int32_t blocks = schedule_blocks(seqlen);
    const std::int64_t cost = exists ? static_cast<std::int64_t>(schedule.shape.items_per_request) *
                                           schedule.item_cost(blocks)
                                     : 0;

    std::int64_t start = 0, scanned_cost = 0;
    CostScan(cost_scan).ExclusiveSum(cost, start, scanned_cost);
    start += tile_cost;
    tile_cost += scanned_cost;

    std::int32_t pieces = 0;
    if (exists) {
      const std::int64_t first_part =
          ceil_div<std::int64_t>(start - schedule.part_begin(0), schedule.payload);
      for (std::int32_t part = max(static_cast<std::int32_t>(first_part), 0);
           part < args.shape.num_parts && schedule.part_begin(part) < start + cost; ++part) {
        starts[part] = {request, seqlen, start};
      }
      for (std::int32_t item = 0; item < schedule.shape.items_per_request; ++item) {
        pieces += schedule.piece(start + item * schedule.item_cost(blocks), blocks, 0).count;
      }
    }
    std::int32_t splits = 0, scanned_pieces = 0;
    PieceScan(piece_scan).ExclusiveSum(pieces, splits, scanned_pieces);
    if (exists) args.num_splits[request] = tile_pieces + splits;
    tile_pieces += scanned_pieces;
  }
  __syncthreads();  // starts

  const std::int32_t part = threadIdx.x;
  if (part < args.shape.num_parts) write_part(args, schedule, starts, tile_cost, part);
  if (part == 0) args.num_splits[args.b] = tile_pieces;
}

__global__ void __launch_bounds__(kThreads) plan_whole(const __grid_constant__ PlanArgs args) {
  for (std::int32_t i = threadIdx.x; i <= args.b; i += kThreads) args.num_splits[i] = i;
  const std::int32_t part = threadIdx.x;
  if (part >= args.shape.num_parts) return;
  if (part == 0 && args.b > 0) {
    write_row(args.metadata, 0, 0, 0, args.b - 1, blocks_of(args, args.b - 1), 0);
  } else {
    write_row(args.metadata, part, args.b, 0, 0, 0, 0);
  }
}

}  // namespace

namespace {

// A plan may be asked for before a block table is known: lengths are held to what the schedule can
// count.
std::int32_t countable_seqlen(const DecodeParams& params, const ScheduleShape& shape) {
  const std::int64_t items = std::int64_t{std::max(params.b, 1)} * shape.items_per_request;
  const std::int64_t blocks = std::max<std::int64_t>(kMostScheduleCost / items - shape.overhead, 1);
  return static_cast<std::int32_t>(
      std::min<std::int64_t>(max_seqlen(params.max_pages), blocks * kBlockTokens));
}

}  // namespace

Status plan_decode(const DecodeParams& params, const DecodeConfig& config, const PlanParams& plan,
                   std::int32_t device, StreamHandle stream) noexcept {
  if (plan.num_parts < 1 || plan.num_parts > kMaxParts) {
    return Status::error(StatusCode::kInternal, "plan_decode: num_parts = %d, wanted 1 .. %d",
                         plan.num_parts, kMaxParts);
  }
  const DeviceGuard guard(device);
  FLASH_MLA_RETURN_IF_ERROR(guard.status());

  PlanArgs args{.cache_seqlens = params.cache_seqlens,
                .b = params.b,
                .max_len = countable_seqlen(params, config.schedule),
                .shape = config.schedule,
                .metadata = plan.metadata,
                .num_splits = plan.num_splits};
  args.shape.num_parts = plan.num_parts;
  const bool split = params.split && args.shape.split && plan.num_parts > 1;

  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(1);
  launch.blockDim = dim3(kThreads);
  launch.stream = static_cast<cudaStream_t>(stream);
  FLASH_MLA_RETURN_IF_CUDA_ERROR(
      cudaLaunchKernelEx(&launch, split ? plan_split : plan_whole, args));
  return {};
}

}  // namespace flash_mla::cuda
