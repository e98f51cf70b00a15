// Walks the work items of one part: the query warp's job.
#pragma once

#include "cuda/sm90/decode_dense/traits.h"

namespace flash_mla::cuda::decode_dense {

// Where this CTA stands in the grid: part, then member of the team, then CTA of the cluster,
// fastest last.
template <int kCluster>
struct Position {
  int32_t part, member;
  __device__ __forceinline__ static int rank() {
    return static_cast<int>(ptx::cta_index() % kCluster);
  }
  __device__ static Position here(const ScheduleShape& shape) {
    const int cluster = blockIdx.x / kCluster;
    if (shape.team == 1) return {cluster, 0};
    const int part = shape.team.quotient(cluster);
    return {part, cluster - part * shape.team};
  }
};

// Tokens that row `row` of the kv head's rows sees.
__device__ __forceinline__ int visible_tokens(const KernelParams& params, int seqlen, int row) {
  return params.decode.causal ? seqlen - params.decode.s_q + 1 + params.row_width.quotient(row)
                              : seqlen;
}

// The schedule that a walk follows.
__device__ __forceinline__ Schedule schedule_of(const KernelParams& params, const Rules& rules) {
  return {params.schedule, rules.payload, rules.whole_parts != 0};
}

// First step of a walk: the item in which this part begins.
__device__ inline Walk begin_walk(const Schedule& schedule, const Start& start, int part) {
  Walk walk = {start.request, start.seqlen, 0, 0, 0};
  walk.relative = static_cast<int32_t>(start.request_start_cost - schedule.part_begin(part));
  // Of the request's items, all equal in cost, skip those that end before this part begins.
  const int32_t cost = schedule.item_cost(schedule_blocks(walk.seqlen));
  if (walk.relative <= -cost) {
    const int item = -walk.relative / cost;
    walk.head = schedule.shape.chunks.quotient(item);
    walk.chunk = item - walk.head * schedule.shape.chunks;
    walk.relative += item * cost;
  }
  return walk;
}

// Goes on to the next item with work for this CTA; item.end says that there is none.
template <int kCluster>
__device__ __forceinline__ void next_item(const KernelParams& params, const Rules& rules,
                                          const Position<kCluster>& position, Walk& walk,
                                          WorkItem& item) {
  const DecodeParams& decode = params.decode;
  const ScheduleShape& shape = params.schedule;
  const Schedule schedule = schedule_of(params, rules);
  while (walk.request < decode.b && walk.relative < rules.payload) {
    const int blocks = schedule_blocks(walk.seqlen);
    const Piece piece = schedule.piece_from(walk.relative, blocks, position.part);
    const int group = walk.chunk * shape.team + position.member;
    const bool has_work = !piece.empty() && group * kCluster * rules.tile_rows <
                                                params.rows;  // the last chunk may be short
    if (has_work) {
      item.request = walk.request;
      item.head = walk.head;
      item.first_row = (group * kCluster + position.rank()) * rules.tile_rows;
      item.rows = min(max(params.rows - item.first_row, 0), rules.tile_rows);
      item.seqlen = walk.seqlen;
      item.pages = walk.seqlen > 0 ? piece.end - piece.begin : 0;
      item.first_token = piece.begin * kPageTokens;
      const int open_tokens =
          visible_tokens(params, walk.seqlen, item.first_row) - item.first_token;
      item.open_pages = min(max(open_tokens, 0) / kPageTokens, item.pages);
      item.piece_index = piece.index;
      item.piece_count = piece.count;
      item.end = 0;
    }
    walk.relative += schedule.item_cost(blocks);
    if (++walk.chunk == rules.chunks) {
      walk.chunk = 0;
      if (++walk.head == decode.h_kv) {
        walk.head = 0;
        if (++walk.request < decode.b) {
          walk.seqlen = clamp_seqlen(__ldg(decode.cache_seqlens + walk.request),
                                     max_seqlen(decode.max_pages));
        }
      }
    }
    if (has_work) return;
  }
  item.end = 1;
}

}  // namespace flash_mla::cuda::decode_dense
