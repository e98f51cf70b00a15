// Sizes, roles and shared memory of the dense decode kernel, and the parameters it takes.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/params.h"
#include "core/schedule.h"
#include "cuda/planner/find_start.cuh"
#include "cuda/sm90/decode_dense/sizes.h"
#include "flash_mla/decode.h"

namespace flash_mla::cuda::decode_dense {

static_assert(kPageTokens == kBlockTokens);

// A page lies in shared memory as nine tiles of 64 tokens x 64 columns, 128-byte swizzled, and
// arrives in three parts.
inline constexpr int kTileColumns = 64;
inline constexpr int kTileBytes = 64 * 64 * 2;
inline constexpr int kQkTiles = kHeadDimQk / kTileColumns;       // 9
inline constexpr int kHalfTiles = kHeadDimV / 2 / kTileColumns;  // 4
inline constexpr int kHalfBytes = kHalfTiles * kTileBytes;       // 32 KB
inline constexpr int kPageBytes = kQkTiles * kTileBytes;         // 72 KB
inline constexpr int kRopeOffset = 2 * kHalfBytes;
enum Part { kLeft = 0, kRight = 1, kRope = 2, kNumParts = 3 };  // columns 0-255, 256-511, 512-575
inline constexpr int kPageBuffers = 2;

// Two consumer warpgroups and one producer warpgroup. The file header of kernel.cuh says who does
// what.
inline constexpr int kWarpgroup = 128;
inline constexpr int kConsumers = 2 * kWarpgroup;
inline constexpr int kThreads = kConsumers + kWarpgroup;
inline constexpr int kPageWarp = kConsumers / 32;  // issues the page loads
inline constexpr int kQueryWarp =
    kConsumers / 32 + 1;  // issues the loads of Q; two more warps idle
// setmaxnreg draws on the 3 x 168 registers the CTA is launched with: 2 x 232 + 40 = 504.
inline constexpr int kConsumerRegisters = 232;
inline constexpr int kProducerRegisters = 40;

// The last kQueryRegisterTiles of Q's nine tiles are multiplied from registers: each spares shared
// memory 128 clocks a pair of pages. In the experiment that this schedule comes from (not measured
// in this kernel) one tile gave 667 to 670 TFLOPS against 653 to 665 with none; two or three spill.
inline constexpr int kQueryRegisterTiles = 1;

// The output is rescaled only when the running maximum grew by more than 2^8 (log2 units); the
// final normalisation makes it exact. Idea: FlashAttention-4.
inline constexpr float kRescaleThreshold = 8.f;
inline constexpr float kNoMaximum = -1e30f;

enum NamedBarrier {
  kP0Ready = 1,
  kP1Ready = 2,
  kConsumersMeet = 3,
  kWarpgroupMeets = 4 /* and 5 */,
};

// One run of pages of one (request, kv head) for the 64 query rows of this CTA; written by the
// query warps with Q.
struct WorkItem {
  int32_t request, head;
  int32_t first_row, rows;  // of the s_q * h_q / h_kv rows of the kv head; rows may be 0
  int32_t pages;            // to multiply
  int32_t masked_pairs;     // the last so many pairs of them hold tokens that some row does not see
  int32_t first_token, seqlen;  // token of the first page's first row; tokens of the request
  int32_t piece_index, piece_count;
  int32_t end;  // no more work, the other members mean nothing
};

// How far a CTA is in its part (work.cuh).
struct Walk {
  int32_t payload;   // of the schedule
  bool whole_parts;  // likewise
  int32_t request, seqlen;
  int32_t item;      // of the request's items
  int32_t relative;  // cost at which the item starts, from the part's begin
};

// A tile of which this CTA did one of several pieces: to be merged when all pieces are there.
struct SplitTile {
  WorkItem item;
  int32_t leavers;  // CTAs that gave up waiting before this one, the last, arrived; 0 if this one
                    // was not the last
};

struct SharedStorage {
  alignas(1024) uint8_t q[kPageBytes];
  alignas(1024) uint8_t page[kPageBuffers][kPageBytes];
  float max[2][kTileRows];
  float sum[2][2][kTileRows];  // [item % 2][warpgroup][row]
  Walk query_walk;             // of the query warps
  WorkItem items[2];
  SplitTile split_tiles[2];  // a part has at most two split items: the one it ends with, and the
                             // one it begins with
  uint64_t full[kPageBuffers][kNumParts];
  uint64_t empty[kPageBuffers][kNumParts];
  uint64_t q_full, q_empty;
  int32_t num_split_tiles, merge_ready;
  FindStartScratch<kThreads> find_start;
};
static_assert(sizeof(SharedStorage) <= 232448, "a CTA has 227 KB of shared memory on sm_90");

// Two fp32 as two adjacent 16-bit elements.
template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<Element, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

using Counter = unsigned long long;  // what atomicAdd takes

struct KernelParams {
  DecodeParams decode;
  ScheduleShape schedule;
  float
      scale_log2;  // |softmax_scale| * log2(e), at least the smallest normal: masked scores stay -inf
  bool negate_scores;    // softmax_scale < 0
  int32_t heads_per_kv;  // h_q / h_kv
  int32_t
      row_width;  // numbers that the rows of a query token have; the first heads_per_kv are rows
  int32_t rows;   // s_q * row_width
  int32_t map_width;    // of the rows along the query map's axis of heads
  Counter* counters;    // one per CTA: arrivals of the split tile whose first piece that CTA does
                        // (merge.cuh)
  std::byte* partials;  // two slots of kPartialBytes per CTA: pieces 1.. of an item go to slot 0,
                        // piece 0 to slot 1
};

struct TensorMaps {
  CUtensorMap query;  // boxes of 64 rows x 9 tiles
  CUtensorMap half;   // of a page, boxes of 64 rows x 4 tiles
  CUtensorMap rope;   // of a page, boxes of 64 rows x 1 tile
};

template <typename Element_, int kCluster_>
struct Traits {
  using Element = Element_;
  static constexpr int kCluster = kCluster_;  // CTAs that share every page by multicast
  static constexpr bool kMulticast = kCluster > 1;
  static constexpr uint16_t kClusterMask = (1u << kCluster) - 1;
};

}  // namespace flash_mla::cuda::decode_dense
