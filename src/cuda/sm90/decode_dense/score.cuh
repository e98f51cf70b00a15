// The score warpgroup: S = Q K^T and the online softmax of every page; P goes to the two output
// warpgroups (output.cuh).
//
// The right half of Q stays in registers (64 a thread) for the whole work item, which leaves shared
// memory room for half a page more, and spares it a quarter of what the scores read. P is written
// over the page's own RoPE part, which nobody needs once the scores are there.
//
// The tensor cores serve the warpgroups in turns, so what is issued when decides what waits. The
// order is laid down with barriers, page by page:
//
//   scores of page j, and with them the left output of page j - 1 | right output of page j - 1,
//   under which the softmax of page j runs | scores of page j + 1 ...
//
// Warpgroup 1 gets P of page j - 1 only when the scores of page j have been issued. The left half
// of a page, of which there are two buffers, is free soonest and needed last.
#pragma once

#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/decode_dense/work.cuh"

namespace flash_mla::cuda::decode_dense {

// Where a thread stands in its warpgroup: it holds rows row_index() and row_index() + 8
// of the accumulators.
// Read anew each time: kept in registers, they and the addresses made of them spill.
__device__ __forceinline__ int lane_index() { return static_cast<int>(ptx::thread_index() % 32); }
__device__ __forceinline__ int row_index() {
  const uint32_t thread = ptx::thread_index() % kWarpgroup;
  return static_cast<int>(thread / 32 * 16 + thread % 32 / 4);
}

// This warp has read the part: all its warps' arrivals, in both CTAs of a pair, free it.
template <typename T>
__device__ __forceinline__ void release(uint64_t* barrier) {
  if (lane_index() == 0) {
    ::cuda::ptx::mbarrier_arrive(barrier);
    if constexpr (T::kMulticast) {
      ptx::mbarrier_arrive_remote(barrier, ::cuda::ptx::get_sreg_cluster_ctarank() ^ 1);
    }
  }
}

template <typename T>
class Scorer {
 public:
  __device__ __forceinline__ Scorer(const KernelParams& params, SharedStorage& shared)
      : params_(params), shared_(shared) {}

  __device__ __forceinline__ void run() {
    for (Ring at(0, kItems);; at.advance()) {
      ptx::mbarrier_wait(&shared_.barriers.item_full[at.slot()], at.phase());
      const WorkItem& item = shared_.items[at.slot()];
      if (item.end) break;
      if (item.pages > 0) run_item(item);
      __syncwarp();
      if (lane_index() == 0) ::cuda::ptx::mbarrier_arrive(&shared_.barriers.item_empty[at.slot()]);
    }
  }

 private:
  using Element = typename T::Element;
  using Mma = ptx::Wgmma<Element>;

  const KernelParams& params_;
  SharedStorage& shared_;
  uint32_t q_[kHalfTiles][4][4];  // the right half of Q as A fragments
  float s_[32];
  float row_max_[2], row_sum_[2];
  Rings at_;

  __device__ __forceinline__ void run_item(const WorkItem& item) {
    load_query(item.query_phase);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row_max_[h] = kNoMaximum;
      row_sum_[h] = 0.f;
    }
    int slot = 0;
#pragma unroll 1
    for (int page = 0; page < item.pages; ++page) {
      issue_scores();
      if (page > 0) hand_over(1, slot);
      const bool masked = page >= item.open_pages;
      slot = at_.rope.slot();
      at_.advance();
      ptx::wgmma_wait<0>();
      ptx::pin(s_);
      if (masked) mask(item, page);
      softmax(slot);
      if (page + 1 < item.pages) hand_over(0, slot);
    }
    if (lane_index() == 0) ::cuda::ptx::mbarrier_arrive(&shared_.barriers.empty[kQueryBuffer]);
    publish_state(slot);
    hand_over(0, slot);
    hand_over(1, slot);
  }

  // Half of Q comes through the ring of the pages.
  __device__ __forceinline__ void load_query(uint32_t phase) {
    const int buffer = at_.right.buffer(), lane = lane_index();
    const int row = row_index() / 16 * 16 + lane % 16;
    const uint32_t source = ptx::shared_address(shared_.half[buffer]) + row * 128;
    ptx::mbarrier_wait(&shared_.barriers.full[buffer], at_.right.phase());
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t chunk = source + (((2 * k + lane / 16) ^ (row & 7)) << 4);
#pragma unroll
      for (int tile = 0; tile < kHalfTiles; ++tile) {
        ptx::load_matrices(q_[tile][k], chunk + tile * kTileBytes);
      }
    }
    __syncwarp();
    release<T>(&shared_.barriers.empty[buffer]);
    at_.right.advance();
    ptx::mbarrier_wait(&shared_.barriers.full[kQueryBuffer], phase);
  }

  // Issues S = Q K^T of the next page as its parts arrive.
  __device__ __forceinline__ void issue_scores() {
    const auto operand = [](const void* tile) {
      return ptx::SmemDescriptor(ptx::shared_address(tile), 16, 1024);
    };
    const ptx::SmemDescriptor right = operand(shared_.half[at_.right.buffer()]);
    const ptx::SmemDescriptor left = operand(shared_.half[at_.left.buffer()]);
    const ptx::SmemDescriptor rope = operand(shared_.rope[at_.rope.slot()]);
    const ptx::SmemDescriptor q_left = operand(shared_.q_left), q_rope = operand(shared_.q_rope);
    ptx::forget(s_);
    wait_for(at_.right);
#pragma unroll
    for (int i = 0; i < 4 * kHalfTiles; ++i) {
      Mma::n64_rs(s_, q_[i / 4][i % 4], right.at(i / 4 * kTileBytes + i % 4 * 32), i != 0);
    }
    wait_for(at_.rope);
#pragma unroll
    for (int i = 0; i < 4; ++i) Mma::n64_ss(s_, q_rope.at(i * 32), rope.at(i * 32), true);
    wait_for(at_.left);
#pragma unroll
    for (int i = 0; i < 4 * kHalfTiles; ++i) {
      const int offset = i / 4 * kTileBytes + i % 4 * 32;
      Mma::n64_ss(s_, q_left.at(offset), left.at(offset), true);
    }
    ptx::wgmma_commit();
  }
  // The wait is a loop: without the fence ptxas serialises the products (C7520).
  __device__ __forceinline__ void wait_for(const Ring& at) {
    ptx::mbarrier_wait(&shared_.barriers.full[at.buffer()], at.phase());
    ptx::wgmma_fence();
  }

  // The output warpgroup may read P in this slot, its factor and state.
  __device__ __forceinline__ void hand_over(int warpgroup, int slot) {
    ::cuda::ptx::mbarrier_arrive(&shared_.barriers.p_ready[warpgroup][slot]);
  }

  // Hides the tokens of the page that a row does not see.
  __device__ __forceinline__ void mask(const WorkItem& item, int page) {
    const int first = item.first_token + page * kPageTokens + lane_index() % 4 * 2;
    const float hidden = params_.negate_scores ? INFINITY : -INFINITY;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = item.first_row + row_index() + 8 * h;
      const int visible = visible_tokens(params_, item.seqlen, row) - first;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        if (((i >> 1) & 1) == h && (i / 4) * 8 + (i & 1) >= visible) s_[i] = hidden;
      }
    }
  }

  // S -> P, in shared memory, with what the output so far must be multiplied with.
  __device__ __forceinline__ void softmax(int slot) {
    if (params_.negate_scores) {
#pragma unroll
      for (int i = 0; i < 32; ++i) s_[i] = -s_[i];
    }
    const int lane = lane_index(), row = row_index();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = -INFINITY;
#pragma unroll
      for (int i = 2 * h; i < 32; i += 4) top = fmaxf(top, fmaxf(s_[i], s_[i + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2)) * params_.scale_log2;
      const float next = top > row_max_[h] + kRescaleThreshold ? top : row_max_[h];
      const float factor = ptx::exp2_approx(row_max_[h] - next);
      row_max_[h] = next;
      row_sum_[h] *= factor;
      if (lane % 4 == 0) shared_.factor[slot][row + 8 * h] = factor;
    }
    // Four 8 x 8 matrices at a time: rows 0-7, 8-15 of the warp, of 16 columns.
    const int target_row = row / 16 * 16 + lane % 16;
    const uint32_t target = ptx::shared_address(shared_.rope[slot]) + target_row * 128;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t p[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float low = probability(8 * k + 2 * j), high = probability(8 * k + 2 * j + 1);
        row_sum_[j & 1] += low + high;
        p[j] = pack<Element>(low, high);
      }
      ptx::store_matrices(target + (((2 * k + lane / 16) ^ (target_row & 7)) << 4), p);
    }
  }
  __device__ __forceinline__ float probability(int i) const {
    return ptx::exp2_approx(fmaf(s_[i], params_.scale_log2, -row_max_[(i >> 1) & 1]));
  }

  // The rows' maxima and sums, complete with the last page of the item.
  __device__ __forceinline__ void publish_state(int slot) {
    const int lane = lane_index(), row = row_index();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = row_sum_[h];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (lane % 4 == 0) shared_.state[slot][row + 8 * h] = {row_max_[h], sum};
    }
  }
};

}  // namespace flash_mla::cuda::decode_dense
