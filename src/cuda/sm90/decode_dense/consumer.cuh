// The two consumer warpgroups: scores, online softmax and output of every page pair.
//
// Of each pair of pages warpgroup 0 takes the even one and warpgroup 1 the odd one: S = Q K^T (64 x
// 64, fp32, 32 registers a thread), softmax, P into the page's own RoPE part, which nobody needs
// any more. Then both multiply both P's with their half of V: warpgroup W keeps columns 256 W ..
// 256 W + 255 of the 64 x 512 output (128 registers a thread). So one warpgroup's softmax runs
// under the other's products ("seesaw"; FlashMLA's deep dive of 2025-04-22). The running maximum
// goes from warpgroup to warpgroup with P.
#pragma once

#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/decode_dense/work.cuh"

namespace flash_mla::cuda::decode_dense {

template <typename T>
struct Consumer {
  using Element = typename T::Element;
  using Mma = ptx::Wgmma<Element>;

  const KernelParams& params;
  SharedStorage& shared;

  float o[128];      // output accumulators, columns 256 W ..
  float s[32];       // scores of this warpgroup's page
  uint32_t p[4][4];  // the same as probabilities, as A fragments
  uint32_t q[kQueryRegisterTiles > 0 ? kQueryRegisterTiles : 1][4][4];
  float row_max[2], row_sum[2];
  // Bit 0: phase of page buffer W; bit 1: of Q and its item. One register: of two, one spills.
  uint32_t phases = 0;

  __device__ __forceinline__ Consumer(const KernelParams& params_in, SharedStorage& shared_in)
      : params(params_in), shared(shared_in) {}

  // Where this thread stands in its warpgroup; it holds rows row() and row() + 8 of the
  // accumulators. Read anew each time: kept in registers, they and the addresses made of them
  // spill.
  __device__ __forceinline__ static int warp() { return ptx::thread_index() % kWarpgroup / 32; }
  __device__ __forceinline__ static int lane() { return ptx::thread_index() % 32; }
  __device__ __forceinline__ static int row() {
    const int thread = ptx::thread_index() % kWarpgroup;
    return thread / 32 * 16 + thread % 32 / 4;
  }

  // Leaves o, row_max and row_sum (of this warpgroup's pages alone) of the item in registers. W:
  // this warpgroup.
  template <int W>
  __device__ __forceinline__ void run(const WorkItem& item) {
#pragma unroll
    for (int i = 0; i < 128; ++i) o[i] = 0.f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row_max[h] = kNoMaximum;
      row_sum[h] = 0.f;
    }
    load_query_tiles();
    int left = (item.pages + 1) / 2;  // pairs
    if constexpr (W == 0) {
      if (left == 0) release_query();
      for (; left > 0; --left) even_step(item, left);
    } else {
      if (item.pages < 2) release_query();
      for (; left > item.pages % 2; --left) odd_step(item, left);
      if (left > 0) last_odd_step(item);
    }
  }

 private:
  // The last tiles of Q as A fragments.
  __device__ __forceinline__ void load_query_tiles() {
    const int lane = this->lane(), row = this->row();
#pragma unroll
    for (int i = 0; i < kQueryRegisterTiles; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int r = row + (j & 1) * 8, chunk = k * 2 + (j >> 1);
          q[i][k][j] = *reinterpret_cast<const uint32_t*>(
              shared.q + (kQkTiles - kQueryRegisterTiles + i) * kTileBytes + r * 128 +
              ((chunk ^ (r & 7)) << 4) + (lane % 4) * 4);
        }
      }
    }
  }

  // Issues S = Q K^T for this warpgroup's page as its parts arrive.
  template <int W>
  __device__ __forceinline__ void issue_scores() {
    const ptx::SmemDescriptor query(ptx::shared_address(shared.q), 16, 1024);
    const ptx::SmemDescriptor key(ptx::shared_address(shared.page[W]), 16, 1024);
    const uint32_t phase = phases & 1;
    phases ^= 1;
#pragma unroll
    for (int tile = 0; tile < kQkTiles; ++tile) {
      if (tile % kHalfTiles == 0) {
        ptx::mbarrier_wait(&shared.full[W][tile / kHalfTiles], phase);
        ptx::wgmma_fence();  // the wait is a loop: without the fence ptxas serialises the products
                             // (C7520)
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint64_t b = key.at(tile * kTileBytes + k * 32);
        constexpr int kFirst = kQkTiles - kQueryRegisterTiles;  // first tile that is in registers
        if (tile < kFirst) {
          Mma::n64_ss(s, query.at(tile * kTileBytes + k * 32), b, tile + k != 0);
        } else {
          Mma::n64_rs(s, q[tile < kFirst ? 0 : tile - kFirst][k], b, true);
        }
      }
    }
    ptx::wgmma_commit();
  }
  // The next item's Q may come while this one's last products and its epilogue run.
  __device__ __forceinline__ void release_query() {
    if (lane() == 0) ::cuda::ptx::mbarrier_arrive(&shared.q_empty);
  }

  // o += P V for this warpgroup's own page, P from registers.
  template <int W>
  __device__ __forceinline__ void issue_output_own() {
    const ptx::SmemDescriptor value(ptx::shared_address(shared.page[W]) + W * kHalfBytes,
                                    kTileBytes, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) Mma::n256_rs(o, p[k], value.at(k * 2048), true);
    ptx::wgmma_commit();
  }
  // o += P V for the other warpgroup's page, P from shared memory.
  template <int W>
  __device__ __forceinline__ void issue_output_other() {
    const uint32_t page = ptx::shared_address(shared.page[1 - W]);
    const ptx::SmemDescriptor value(page + W * kHalfBytes, kTileBytes, 1024);
    const ptx::SmemDescriptor probability(page + kRopeOffset, 16, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      Mma::n256_ss(o, probability.at(k * 32), value.at(k * 2048), true);
    }
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void finish_output() {
    ptx::wgmma_wait<0>();
    ptx::pin(o);
  }

  __device__ __forceinline__ void release(int buffer, Part part) {
    if (lane() == 0) {
      ::cuda::ptx::mbarrier_arrive(&shared.empty[buffer][part]);
      if constexpr (T::kMulticast)
        ptx::mbarrier_arrive_remote(&shared.empty[buffer][part],
                                    ::cuda::ptx::get_sreg_cluster_ctarank() ^ 1);
    }
  }

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
    if (__any_sync(~0u, factor[0] != 1.f || factor[1] != 1.f)) {
#pragma unroll
      for (int i = 0; i < 128; ++i) o[i] *= factor[(i >> 1) & 1];
    }
    ptx::pin(o);
  }

  // Takes over the other warpgroup's running maximum; `factor` is what o must be multiplied with.
  template <int W>
  __device__ __forceinline__ void adopt_maximum(float (&factor)[2]) {
    const int row = this->row();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float other = shared.max[1 - W][row + 8 * h];
      factor[h] = ptx::exp2_approx(row_max[h] - other);
      row_max[h] = other;
      row_sum[h] *= factor[h];
    }
  }

  // s -> p; publishes the running maximum and P. `factor` is what o must be multiplied with.
  template <int W>
  __device__ __forceinline__ void softmax(float (&factor)[2]) {
    if (params.negate_scores) {
#pragma unroll
      for (int i = 0; i < 32; ++i) s[i] = -s[i];
    }
    softmax_of_scores<W>(factor);
  }
  template <int W>
  __device__ __forceinline__ void softmax_of_scores(float (&factor)[2]) {
    const int lane = this->lane(), row = this->row();
    const float scale = params.scale_log2;
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < 32; ++i) top[(i >> 1) & 1] = fmaxf(top[(i >> 1) & 1], s[i]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
      top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2)) * scale;
      const float next = top[h] > row_max[h] + kRescaleThreshold ? top[h] : row_max[h];
      factor[h] = ptx::exp2_approx(row_max[h] - next);
      row_max[h] = next;
      row_sum[h] *= factor[h];
      if (lane % 4 == 0) shared.max[W][row + 8 * h] = next;
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      s[i] = ptx::exp2_approx(fmaf(s[i], scale, -row_max[(i >> 1) & 1]));
      row_sum[(i >> 1) & 1] += s[i];
    }
    uint8_t* target = shared.page[W] + kRopeOffset;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint32_t packed = pack<Element>(s[2 * i], s[2 * i + 1]);
      p[i / 4][i % 4] = packed;
      const int r = row + (i & 1) * 8;
      *reinterpret_cast<uint32_t*>(target + r * 128 + (((i / 2) ^ (r & 7)) << 4) + (lane % 4) * 4) =
          packed;
    }
    ptx::fence_proxy_async();
    // NOTE: the writer waits too, though it need not. compute-sanitizer (CUDA 13.0) is of two
    // minds: racecheck does not follow bar.arrive and reports this hand-over and barriers after it;
    // with bar.sync racecheck is clean, but synccheck takes the two warpgroups' meeting from two
    // places in the code for divergence. Neither is a fault of the kernel. An mbarrier should
    // satisfy both: to be tried with the next GPU run. Waiting costs 0 to 2 % (b 1, s_kv
    // 65536: 57.4 us against 56.3).
    ptx::named_barrier_sync(W == 0 ? kP0Ready : kP1Ready, kConsumers);
  }

  // Page `buffer` of the pair with `left` pairs left.
  __device__ __forceinline__ static int page_of(const WorkItem& item, int left, int buffer) {
    return (item.pages + 1) / 2 * 2 - 2 * left + buffer;
  }

  // Hides the tokens of this warpgroup's page that a row does not see.
  template <int W>
  __device__ __forceinline__ void mask(const WorkItem& item, int left) {
    const int lane = this->lane(), row = this->row();
    const float hidden = params.negate_scores ? INFINITY : -INFINITY;
    const int first = item.first_token + page_of(item, left, W) * kPageTokens + (lane % 4) * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int visible = visible_tokens(params, item.seqlen, item.first_row + row + 8 * h) - first;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        if (((i >> 1) & 1) == h && (i / 4) * 8 + (i & 1) >= visible) s[i] = hidden;
      }
    }
  }

  // Rows of the request's last page past its length may hold NaN, and 0 * NaN is NaN: zeroes them
  // in this warpgroup's half of V.
  template <int W>
  __device__ __forceinline__ void clear_rows_past_end(const WorkItem& item, int left, int buffer) {
    const int valid = item.seqlen - item.first_token - page_of(item, left, buffer) * kPageTokens;
    if (valid >= kPageTokens) return;
    uint8_t* half = shared.page[buffer] + W * kHalfBytes;
    constexpr int kChunks = kHalfTiles * 8;  // of 16 bytes, in a row of the half
#pragma unroll 1
    for (int i = ptx::thread_index() % kWarpgroup; i < (kPageTokens - valid) * kChunks;
         i += kWarpgroup) {
      const int r = valid + i / kChunks, chunk = i % kChunks;
      *reinterpret_cast<int4*>(half + chunk / 8 * kTileBytes + r * 128 + chunk % 8 * 16) =
          int4{0, 0, 0, 0};
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(kWarpgroupMeets + W, kWarpgroup);
  }

  // Warpgroup 0's side of a pair of pages, of which the second may not exist. `left`: pairs of the
  // item still to do, this one included. There is one copy of this code for masked and open pairs:
  // what a short decode waits for is its instructions.
  __device__ __forceinline__ void even_step(const WorkItem& item, int left) {
    const bool masked = left <= item.masked_pairs;
    float factor[2];
    issue_scores<0>();
    ptx::wgmma_wait<0>();
    ptx::pin(s);
    if (left == 1) release_query();
    if (masked) mask<0>(item, left);
    softmax<0>(factor);
    if (masked) clear_rows_past_end<0>(item, left, 0);
    rescale(factor);
    issue_output_own<0>();
    finish_output();
    release(0, kLeft);
    if (left == 1 && item.pages % 2 == 1) return;
    ptx::named_barrier_sync(kP1Ready, kConsumers);
    adopt_maximum<0>(factor);
    if (masked) clear_rows_past_end<0>(item, left, 1);
    rescale(factor);
    issue_output_other<0>();
    finish_output();
    release(1, kLeft);
    release(1, kRope);
  }

  // Warpgroup 1's side of a pair. The other's P V is queued behind its own scores, and its softmax
  // runs under that product.
  __device__ __forceinline__ void odd_step(const WorkItem& item, int left) {
    const bool masked = left <= item.masked_pairs;
    float factor[2];
    issue_scores<1>();
    ptx::named_barrier_sync(kP0Ready, kConsumers);
    adopt_maximum<1>(factor);
    // The maximum seldom moves; when it does, what is in flight is waited for.
    if (__any_sync(~0u, factor[0] != 1.f || factor[1] != 1.f)) {
      ptx::wgmma_wait<0>();
      ptx::pin(s);
      ptx::pin(o);
      rescale(factor);
    }
    issue_output_other<1>();
    ptx::wgmma_wait<1>();
    ptx::pin(s);
    if (left == 1 + item.pages % 2) release_query();
    if (masked) {
      ptx::wgmma_wait<0>();
      ptx::pin(o);
      mask<1>(item, left);
    }
    softmax<1>(factor);
    finish_output();
    release(0, kRight);
    release(0, kRope);
    if (masked) clear_rows_past_end<1>(item, left, 1);
    rescale(factor);
    issue_output_own<1>();
    finish_output();
    release(1, kRight);
  }

  // The same when the last pair has one page only: warpgroup 0's.
  __device__ __forceinline__ void last_odd_step(const WorkItem& item) {
    float factor[2];
    ptx::named_barrier_sync(kP0Ready, kConsumers);
    adopt_maximum<1>(factor);
    clear_rows_past_end<1>(item, 1, 0);
    rescale(factor);
    issue_output_other<1>();
    finish_output();
    release(0, kRight);
    release(0, kRope);
  }
};

}  // namespace flash_mla::cuda::decode_dense
