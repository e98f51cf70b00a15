// The score warpgroup: S = Q K^T and the online softmax of every page; P goes to the two output
// warpgroups (output.cuh).
//
// Three of Q's nine tiles stay in registers (48 a thread) for the whole work item, which leaves
// shared memory room for three tiles more. P is written over the page's own RoPE part, which nobody
// needs once the scores are there.
//
// The tensor cores serve the warpgroups in turns, so what is issued when decides what waits. The
// order is laid down with barriers, page by page:
//
//   scores of page j, and with them the left output of page j - 1 | right output of page j - 1,
//   under which the softmax of page j runs | scores of page j + 1 ...
//
// Both output warpgroups fetch P of page j - 1 when it is there, but warpgroup 1 multiplies it only
// when the scores of page j have been issued. The left half of a page, of which there are two
// buffers, is free soonest and needed last.
//
// From the last score of a page to the first product of the next one nothing else keeps the tensor
// cores busy than the right output, and that is shorter. So nothing stands there that can be done
// elsewhere: addresses are worked out under the scores, and maxima sought only when those of the
// pages before do not do.
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
  uint32_t q_[kRegisterTiles][4][4];  // of the right half of Q, as A fragments
  float s_[32];
  float row_max_[2], row_sum_[2];
  Rings at_;

  __device__ __forceinline__ void run_item(const WorkItem& item) {
    load_query();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row_max_[h] = kNoMaximum;
      row_sum_[h] = 0.f;
    }
    int left = item.pages;
    PageRing last;
    const ptx::SmemDescriptor q = operand(shared_.q_left);  // and q_end
    Operands next = operands();
    const float scale = __shfl_sync(~0u, params_.scale_log2, 0);  // else read anew for each page
    for (bool first = true;; first = false) {
      issue_scores(q, item.query_phase, next);
      if (!first) arrive(&shared_.barriers.may_start[last.turn()]);
      const int page = item.pages - left;
      const bool plain = page < item.open_pages && !params_.negate_scores;
      last = at_.rope;
      at_.advance();
      next = operands();
      const Place place = place_of_p(last.slot());
      ptx::wgmma_wait<0>();
      ptx::pin(s_);
      if (!plain) adjust(item, page);
      softmax(place, scale, first);
      if (--left == 0) break;
      arrive(&shared_.barriers.p_ready[last.slot()]);
    }
    if (lane_index() == 0) ::cuda::ptx::mbarrier_arrive(&shared_.barriers.empty[kQueryBuffer]);
    publish_state(last.slot());
    arrive(&shared_.barriers.p_ready[last.slot()]);
    arrive(&shared_.barriers.may_start[last.turn()]);
  }

  // What of Q lives in registers comes through the ring of the pages.
  __device__ __forceinline__ void load_query() {
    const int buffer = at_.right.buffer(), lane = lane_index();
    const int row = row_index() / 16 * 16 + lane % 16;
    const uint32_t source = ptx::shared_address(shared_.half[buffer]) + row * 128;
    ptx::mbarrier_wait(&shared_.barriers.full[buffer], at_.right.phase());
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t chunk = source + (((2 * k + lane / 16) ^ (row & 7)) << 4);
#pragma unroll
      for (int tile = 0; tile < kRegisterTiles; ++tile) {
        ptx::load_matrices(q_[tile][k], chunk + tile * kTileBytes);
      }
    }
    __syncwarp();
    release<T>(&shared_.barriers.empty[buffer]);
    at_.right.advance();
  }

  // Where the parts of a page lie; worked out while the tensor cores are busy with the page before.
  struct Operands {
    ptx::SmemDescriptor right, rope, left;
  };
  __device__ __forceinline__ Operands operands() const {
    return {operand(shared_.half[at_.right.buffer()]), operand(shared_.rope[at_.rope.slot()]),
            operand(shared_.half[at_.left.buffer()])};
  }
  __device__ __forceinline__ static ptx::SmemDescriptor operand(const void* tile) {
    return {ptx::shared_address(tile), 16, 1024};
  }

  // Issues S = Q K^T of the next page as its parts arrive, and with the first one, the rest of Q.
  __device__ __forceinline__ void issue_scores(const ptx::SmemDescriptor& q, uint32_t query_phase,
                                               const Operands& k) {
    ptx::forget(s_);
    wait_for(at_.right.buffer(), at_.right.phase());
#pragma unroll
    for (int i = 0; i < 4 * kRegisterTiles; ++i) {
      Mma::n64_rs(s_, q_[i / 4][i % 4], k.right.at(i / 4 * kTileBytes + i % 4 * 32), i != 0);
    }
    wait_for(kQueryBuffer, query_phase);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Mma::n64_ss(s_, q.at(kHalfBytes + i * 32), k.right.at(kRegisterTiles * kTileBytes + i * 32),
                  true);
    }
    wait_for(at_.rope.buffer(), at_.rope.phase());
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Mma::n64_ss(s_, q.at(kHalfBytes + kTileBytes + i * 32), k.rope.at(i * 32), true);
    }
    wait_for(at_.left.buffer(), at_.left.phase());
#pragma unroll
    for (int i = 0; i < 4 * kHalfTiles; ++i) {
      const int offset = i / 4 * kTileBytes + i % 4 * 32;
      Mma::n64_ss(s_, q.at(offset), k.left.at(offset), true);
    }
    ptx::wgmma_commit();
  }
  // The wait is a loop: without the fence ptxas serialises the products (C7520).
  __device__ __forceinline__ void wait_for(int buffer, uint32_t phase) {
    ptx::mbarrier_wait(&shared_.barriers.full[buffer], phase);
    ptx::wgmma_fence();
  }

  __device__ __forceinline__ static void arrive(uint64_t* barrier) {
    ::cuda::ptx::mbarrier_arrive(barrier);
  }

  // Turns the scores' sign where the scale is negative, and hides the tokens of the page that a row
  // does not see.
  __device__ __forceinline__ void adjust(const WorkItem& item, int page) {
    const int first = item.first_token + page * kPageTokens + lane_index() % 4 * 2;
    if (params_.negate_scores) {
#pragma unroll
      for (int i = 0; i < 32; ++i) s_[i] = -s_[i];
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = item.first_row + row_index() + 8 * h;
      const int visible = visible_tokens(params_, item.seqlen, row) - first;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        if (((i >> 1) & 1) == h && (i / 4) * 8 + (i & 1) >= visible) s_[i] = -INFINITY;
      }
    }
  }

  // Where this lane stores its share of P, and the factors of its rows, if it is the one that does.
  struct Place {
    uint32_t* p;
    bool has_factor;
    float* factor;
  };
  __device__ __forceinline__ Place place_of_p(uint32_t slot) const {
    const int lane = lane_index(), row = row_index();
    return {reinterpret_cast<uint32_t*>(shared_.rope[slot]) + ptx::thread_index() % kWarpgroup,
            lane % 4 == 0, &shared_.factor[slot][row]};
  }

  // S -> P, in shared memory, with what the output so far must be multiplied with. Nearly always
  // the maxima of the pages before will do, so they are tried first, and S is kept until it is
  // clear that no score is above them by more than the threshold. If so, find_maxima() would have
  // left them, and what comes out is the same, bit for bit.
  __device__ __forceinline__ void softmax(const Place& place, float scale, bool first_page) {
    float factor[2] = {1.f, 1.f}, sum[2];
#pragma unroll 1
    for (bool tried = first_page;; tried = true) {
      if (tried) find_maxima(scale, factor);
      sum[0] = sum[1] = 0.f;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float low = probability(8 * k + 2 * j, scale),
                      high = probability(8 * k + 2 * j + 1, scale);
          sum[j & 1] += low + high;
          place.p[(4 * k + j) * kWarpgroup] = pack<Element>(low, high);  // as its operand A has it
        }
      }
      const bool bounded = sum[0] + sum[1] <= kSafeProbability;  // false for NaN
      if (tried || __all_sync(~0u, bounded)) break;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row_sum_[h] = row_sum_[h] * factor[h] + sum[h];
      if (place.has_factor) place.factor[8 * h] = factor[h];
    }
  }
  // New maxima where the old ones are surpassed by more than the threshold, and what that
  // multiplies the sums so far with.
  __device__ __forceinline__ void find_maxima(float scale, float (&factor)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = -INFINITY;
#pragma unroll
      for (int i = 2 * h; i < 32; i += 4) top = fmaxf(top, fmaxf(s_[i], s_[i + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2)) * scale;
      float next = top > row_max_[h] + kRescaleThreshold ? top : row_max_[h];
      next += next - next;  // infinity: NaN, the row is lost
      factor[h] = ptx::exp2_approx(row_max_[h] - next);
      row_max_[h] = next;
    }
  }
  __device__ __forceinline__ float probability(int i, float scale) const {
    return ptx::exp2_approx(fmaf(s_[i], scale, -row_max_[(i >> 1) & 1]));
  }

  // The rows' maxima and sums, complete with the last page of the item.
  __device__ __forceinline__ void publish_state(uint32_t slot) {
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
