// Sizes, roles and shared memory of the dense decode kernel, and the parameters it takes.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
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
inline constexpr int kHalfTiles = kHeadDimV / 2 / kTileColumns;  // 4
inline constexpr int kHalfBytes = kHalfTiles * kTileBytes;       // 32 KB
inline constexpr int kRopeTile = 2 * kHalfTiles;
// Of Q's right half the score warpgroup keeps so many tiles in registers.
inline constexpr int kRegisterTiles = 3;

// Work items at once: of four with one page each, one may be in the right output, one in the left,
// one in the scores, and one on its way.
inline constexpr int kItems = 4;
// Tiles of which a CTA did one of more than two pieces: to be merged when all pieces are there. A
// part has at most two split items: the one it begins with, and the one it ends with.
inline constexpr int kSplitTiles = 2;

// Four warpgroups. The file header of kernel.cuh says who does what.
inline constexpr int kWarpgroup = 128;
inline constexpr int kOutputThreads = 2 * kWarpgroup;  // warpgroups 0, 1
inline constexpr int kScoreWarpgroup = 2, kProducerWarpgroup = 3;
// Warps of warpgroup 3: the first one walks the work items, the others load a kind of buffer each.
inline constexpr int kQueryWarp = 12, kRightWarp = 13, kLeftWarp = 14, kRopeWarp = 15;
inline constexpr int kThreads = 4 * kWarpgroup;
// Of the 4 x 128 registers that the CTA is launched with the score warpgroup keeps its 128, and the
// output warpgroups get what the producers give: 2 x 176 + 128 + 32 = 512.
inline constexpr int kOutputRegisters = 176;
inline constexpr int kProducerRegisters = 32;

// The output is rescaled only when the running maximum grew by more than 2^8 (log2 units); the
// final normalisation makes it exact. Idea: FlashAttention-4.
inline constexpr float kRescaleThreshold = 8.f;
// Of probabilities that are no larger, no score is above its row's maximum by the threshold; half
// of 2^kRescaleThreshold, so that rounding does not matter.
inline constexpr float kSafeProbability = 128.f;
inline constexpr float kNoMaximum = -FLT_MAX;

enum NamedBarrier { kOutputMeets = 1, kWarpgroupMeets = 2 /* and 3 */, kProducersMeet = 4 };

// Who finds where the CTA's part starts, unless requests are few.
using Producers = Team<kWarpgroup, kProducersMeet>;

// Shared memory holds two left halves of pages (columns 0-255), three right halves (256-511) and
// two RoPE parts (512-575), each kind a ring of buffers, and of Q what is not in registers.
// The buffers are numbered through; each has a pair of barriers.
inline constexpr int kLeftBuffers = 2, kRightBuffers = 3, kRopeBuffers = 2;
inline constexpr int kHalfBuffers = kLeftBuffers + kRightBuffers;
inline constexpr int kQueryBuffer = kHalfBuffers + kRopeBuffers;
inline constexpr int kBuffers = kQueryBuffer + 1;
// Warpgroup 1 is told to start page by page. The scores cannot tell it more than three times ahead:
// for another page they want a right half that it has not released.
inline constexpr int kTurns = 4;
static_assert(kTurns > kRightBuffers && kTurns % kRopeBuffers == 0);

// Where a warp is in a ring of `count` buffers, of which `first` is the first.
class Ring {
 public:
  __device__ __forceinline__ constexpr Ring(int first, int count, int position = 0)
      : first_(first), count_(count), position_(position) {}
  __device__ __forceinline__ int position() const { return position_; }  // 0 .. 2 * count - 1
  __device__ __forceinline__ int slot() const {
    return position_ < count_ ? position_ : position_ - count_;
  }
  __device__ __forceinline__ int buffer() const { return first_ + slot(); }
  // Parity with which the buffer's `full` barrier is waited for.
  __device__ __forceinline__ uint32_t phase() const { return position_ < count_ ? 0 : 1; }
  __device__ __forceinline__ void advance() {
    position_ = position_ + 1 == 2 * count_ ? 0 : position_ + 1;
  }
  __device__ __forceinline__ void advance(int by) { position_ = (position_ + by) % (2 * count_); }

 private:
  int32_t first_, count_, position_;
};

// Counts pages: which RoPE buffer is a page's, and its P's, and which of the turns it has.
class PageRing {
 public:
  __device__ __forceinline__ constexpr explicit PageRing(uint32_t position = 0)
      : position_(position) {}
  __device__ __forceinline__ uint32_t position() const { return position_; }  // 0 .. 7
  __device__ __forceinline__ uint32_t slot() const { return position_ % kRopeBuffers; }
  __device__ __forceinline__ uint32_t buffer() const { return kHalfBuffers + slot(); }
  __device__ __forceinline__ uint32_t phase() const { return position_ / kRopeBuffers % 2; }
  __device__ __forceinline__ uint32_t turn() const { return position_ % kTurns; }
  __device__ __forceinline__ uint32_t turn_phase() const { return position_ / kTurns; }
  __device__ __forceinline__ void advance(uint32_t by = 1) {
    position_ = (position_ + by) % (2 * kTurns);
  }

 private:
  uint32_t position_;
};

// A warp's place in the rings of the pages' parts.
struct Rings {
  Ring left{0, kLeftBuffers};
  Ring right{kLeftBuffers, kRightBuffers};
  PageRing rope;
  __device__ __forceinline__ void advance() {
    left.advance();
    right.advance();
    rope.advance();
  }
};

// One run of pages of one (request, kv head) for the query rows of this CTA; written by the query
// warp.
struct WorkItem {
  int32_t request, head;
  int32_t first_row;            // of the s_q * h_q / h_kv rows of the kv head
  int32_t pages;                // to multiply
  int32_t open_pages;           // the first so many of them hold only tokens that every row sees
  int32_t first_token, seqlen;  // token of the first page's first row; tokens of the request
  int16_t rows;                 // from first_row on; may be 0
  uint8_t end;                  // no more work, the other members mean nothing
  int16_t piece_index, piece_count;
  uint8_t left, right, rope;  // the rings' positions at its begin; Q's right half goes first
  uint8_t query_phase;        // with which the rest of Q is waited for
};

// What a CTA has found out about the schedule.
struct Rules {
  Divider payload;
  int32_t whole_parts, chunks, tile_rows;
};

// How far a CTA is in its part (work.cuh).
struct Walk {
  int32_t request, seqlen;
  int32_t head, chunk;  // of the request's items
  int32_t relative;     // cost at which the item starts, from the part's begin
};

// What a CTA has to know before it can begin.
struct First {
  Rules rules;
  Walk walk;      // behind the first item
  WorkItem item;  // the first one
};

struct Barriers {
  uint64_t full[kBuffers], empty[kBuffers];
  uint64_t p_ready[kRopeBuffers];  // P of a page is there
  uint64_t may_start[kTurns];      // warpgroup 1 may multiply it
  uint64_t item_full[kItems], item_empty[kItems];
};
inline constexpr int kBarriers = sizeof(Barriers) / sizeof(uint64_t);

struct SharedStorage {
  alignas(1024) uint8_t half[kHalfBuffers][kHalfBytes];  // of pages; of Q, on its way to registers
  alignas(1024) uint8_t q_left[kHalfBytes];
  alignas(1024) uint8_t q_end[2][kTileBytes];  // the last tile of the right half, the RoPE part
  // The RoPE part of a page, then P: [4 steps of 16 tokens][4 registers of the output's
  // operand][128 threads][two elements].
  alignas(1024) uint8_t rope[kRopeBuffers][kTileBytes];
  float factor[kRopeBuffers][kTileRows];    // what the output is multiplied with before the page
  RowState state[kRopeBuffers][kTileRows];  // of an item, with its last page
  WorkItem items[kItems + kSplitTiles];     // those of split tiles last
  Barriers barriers;
  uint64_t merge_landed[2];  // barriers of what the merge copies: units, states
  int32_t num_split_tiles, merge_ready;
  First first;  // the query warp's
  FindStartScratch<Producers> find_start;
};
static_assert(offsetof(SharedStorage, q_end) == offsetof(SharedStorage, q_left) + kHalfBytes);
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

struct Memo;                         // memo.cuh
using Counter = unsigned long long;  // what atomicAdd takes

struct KernelParams {
  DecodeParams decode;
  ScheduleShape schedule;
  float
      scale_log2;  // |softmax_scale| * log2(e), at least the smallest normal: masked scores stay -inf
  bool negate_scores;    // softmax_scale < 0
  int32_t heads_per_kv;  // h_q / h_kv
  Divider
      row_width;  // numbers that the rows of a query token have; the first heads_per_kv are rows
  int32_t rows;   // s_q * row_width
  Divider map_width;    // of the rows along the query map's axis of heads
  bool prefetch_pages;  // a page is one run of memory, and one cluster reads it for a request
  Counter* counters;    // one per CTA: arrivals of the split tile whose first piece that CTA does
                        // (merge.cuh)
  std::byte* partials;  // [CTAs of a part][parts][2] of kPartialBytes (PartialPlaces)
  Memo* memos;          // one per CTA
  uint64_t memo_key;    // of everything but the lengths that a CTA's First follows from
};

struct TensorMaps {
  CUtensorMap query_half, query_rope;  // of Q, boxes of 64 rows x 4 tiles, 64 rows x 1 tile
  CUtensorMap half, rope;              // of a page, the same
};

template <typename Element_, int kCluster_>
struct Traits {
  using Element = Element_;
  static constexpr int kCluster = kCluster_;  // CTAs that share every page by multicast
  static constexpr bool kMulticast = kCluster > 1;
  static constexpr uint16_t kClusterMask = (1u << kCluster) - 1;
  // A part of at most so many pages asks L2 to let them go first, as all do with Q (but not a CTA's
  // first page, where other clusters read it). So they do not push out what others have written,
  // which would have to go to memory before they can come. With pages it costs longer decodes 1 to
  // 4 % (bench/results/steps/2026-11-28-h100).
  static constexpr int kStreamedPages = kCluster == 1 ? 16 : 96;
  // Of a longer part whose pages come to L2 ahead (KernelParams::prefetch_pages) the same is asked
  // for items of at most so many pages: it saves 3 % where requests are of 512 or 1,024 tokens.
  // With longer ones it saves 1 % at most, and costs 2 to 5 % where requests share pages.
  static constexpr int kStreamedItemPages = 16;
};

}  // namespace flash_mla::cuda::decode_dense
