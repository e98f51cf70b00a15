// The two output warpgroups: O += P V of every page. Warpgroup W keeps columns 256 W .. 256 W + 255
// of the 64 x 512 output in registers (128 a thread). P comes from the score warpgroup through
// shared memory and is multiplied from registers: as an operand in shared memory it would be read
// twice.
#pragma once

#include "cuda/sm90/decode_dense/score.cuh"

namespace flash_mla::cuda::decode_dense {

template <typename T>
class Output {
 public:
  // Accumulators: [128 columns][tile of 8 columns][row_index() or row_index() + 8][2].
  float o[2][64];
  RowState state[2];  // of rows row_index(), row_index() + 8 of the item
  __device__ __forceinline__ float at(int i) const { return o[i / 64][i % 64]; }
  __device__ __forceinline__ Output(const KernelParams& params, SharedStorage& shared)
      : params_(params), shared_(shared) {}

  // Leaves the item's sums in o and state.
  __device__ __forceinline__ void run(const WorkItem& item) {
#pragma unroll
    for (int i = 0; i < 128; ++i) o[i / 64][i % 64] = 0.f;
    if (item.pages == 0) {
      state[0] = state[1] = {kNoMaximum, 0.f};
      return;
    }
    const bool right = warpgroup() == 1;
    Ring half(right ? kLeftBuffers : 0, right ? kRightBuffers : kLeftBuffers,
              right ? item.right : item.left);
    PageRing rope(item.rope);
    if (right) half.advance();  // past Q
    int left = item.pages;
#pragma unroll 1
    for (bool first = true;; first = false) {
      if (left == 1) clear_rows_past_end(item, half);
      multiply(half, rope, first, left == 1);
      ptx::wgmma_wait<0>();
      ptx::pin(o[0]);
      ptx::pin(o[1]);
      release<T>(&shared_.barriers.empty[half.buffer()]);
      if (--left == 0) break;
      half.advance();
      rope.advance();
    }
  }

 private:
  using Element = typename T::Element;
  using Mma = ptx::Wgmma<Element>;

  const KernelParams& params_;
  SharedStorage& shared_;

  __device__ __forceinline__ static int warpgroup() {
    return static_cast<int>(ptx::thread_index() / kWarpgroup);
  }

  // Issues o = factor * o + P V of this warpgroup's half of the page.
  __device__ __forceinline__ void multiply(const Ring& half, const PageRing& rope, bool first,
                                           bool last) {
    const ptx::SmemDescriptor value(ptx::shared_address(shared_.half[half.buffer()]), kTileBytes,
                                    1024);
    const uint32_t* source = reinterpret_cast<const uint32_t*>(shared_.rope[rope.slot()]) +
                             ptx::thread_index() % kWarpgroup;
    ptx::mbarrier_wait(&shared_.barriers.p_ready[rope.slot()], rope.phase());
    uint32_t p[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) p[i / 4][i % 4] = source[i * kWarpgroup];
    if (!first) rescale(shared_.factor[rope.slot()]);
    if (last) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        state[h] = shared_.state[rope.slot()][row_index() + 8 * h];
      }
    }
    if (warpgroup() == 1) {
      release_p(rope);
      ptx::mbarrier_wait(&shared_.barriers.may_start[rope.turn()], rope.turn_phase());
    }
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        Mma::n128_rs(o[c], p[k], value.at(k * 2048 + c * 2 * kTileBytes), true);
      }
    }
    ptx::wgmma_commit();
    if (warpgroup() == 0) release_p(rope);
  }

  // Nobody needs P in shared memory any more. Threads wrote and read it, the part of a page that
  // comes next is written by TMA.
  __device__ __forceinline__ void release_p(const PageRing& rope) {
    ptx::fence_proxy_async();
    __syncwarp();
    release<T>(&shared_.barriers.empty[rope.buffer()]);
  }

  // The factor is seldom another than 1.
  __device__ __forceinline__ void rescale(const float* factors) {
    const float factor[2] = {factors[row_index()], factors[row_index() + 8]};
    if (__any_sync(~0u, factor[0] != 1.f || factor[1] != 1.f)) {
#pragma unroll
      for (int i = 0; i < 128; ++i) o[i / 64][i % 64] *= factor[(i >> 1) & 1];
    }
    ptx::pin(o[0]);
    ptx::pin(o[1]);
  }

  // Rows of the request's last page past its length may hold NaN, and 0 * NaN is NaN: zeroes them
  // in this warpgroup's half of V. The scores may be reading them as K meanwhile: those of hidden
  // tokens are masked, whatever they are.
  __device__ __forceinline__ void clear_rows_past_end(const WorkItem& item, const Ring& at) {
    const int valid = item.seqlen - item.first_token - (item.pages - 1) * kPageTokens;
    if (valid >= kPageTokens) return;
    ptx::mbarrier_wait(&shared_.barriers.full[at.buffer()], at.phase());
    constexpr int kChunks = kHalfTiles * 8;  // of 16 bytes, in a row of the half
    static_assert(kWarpgroup % kChunks == 0);
    const int thread = static_cast<int>(ptx::thread_index() % kWarpgroup);
    uint8_t* column =
        shared_.half[at.buffer()] + thread % kChunks / 8 * kTileBytes + thread % 8 * 16;
#pragma unroll 1
    for (int row = valid + thread / kChunks; row < kPageTokens; row += kWarpgroup / kChunks) {
      *reinterpret_cast<int4*>(column + row * 128) = int4{0, 0, 0, 0};
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(kWarpgroupMeets + warpgroup(), kWarpgroup);
  }
};

}  // namespace flash_mla::cuda::decode_dense
