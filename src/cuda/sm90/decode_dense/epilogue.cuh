// What becomes of the accumulators when an item is done: normalised output rows, or a partial
// result for the merge.
#pragma once

#include "cuda/sm90/decode_dense/consumer.cuh"

namespace flash_mla::cuda::decode_dense {

// Places of the tile's rows in out and lse.
template <typename Element>
struct Rows {
  const KernelParams& params;
  const WorkItem& item;

  struct Index {
    int s, head;
  };
  __device__ __forceinline__ Index index(int row) const {
    const int r = item.first_row + row;
    return {r / params.heads_per_kv, item.head * params.heads_per_kv + r % params.heads_per_kv};
  }
  __device__ __forceinline__ Element* out(int row) const {
    const DecodeParams& decode = params.decode;
    const Index at = index(row);
    return static_cast<Element*>(decode.out) + item.request * decode.stride_out_b +
           at.s * decode.stride_out_s + at.head * decode.stride_out_h;
  }
  // `sum` 0: the row saw no key.
  __device__ __forceinline__ void store_lse(int row, RowState state) const {
    const DecodeParams& decode = params.decode;
    if (decode.lse == nullptr || row >= item.rows) return;
    constexpr float kLn2 = 0.693147180559945309f;
    const Index at = index(row);
    decode.lse[item.request * decode.stride_lse_b + at.head * decode.stride_lse_h +
               at.s * decode.stride_lse_s] =
        state.sum > 0.f ? (state.max + __log2f(state.sum)) * kLn2 : decode.empty_lse;
  }
};

// Partial results of a CTA: two slots.
__device__ __forceinline__ float* partial_output(const KernelParams& params, int cta, int slot) {
  return reinterpret_cast<float*>(params.partials +
                                  (2 * static_cast<int64_t>(cta) + slot) * kPartialBytes);
}
__device__ __forceinline__ RowState* partial_rows(float* output) {
  return reinterpret_cast<RowState*>(output + kPartialFloats);
}

template <typename T>
struct Epilogue {
  using Element = typename T::Element;
  Consumer<T>& consumer;
  const KernelParams& params;
  SharedStorage& shared;

  // `parity`: of the item, so that its sums and the next one's do not meet.
  __device__ __forceinline__ void run(const WorkItem& item, uint32_t parity) {
    const int warpgroup = threadIdx.x / kWarpgroup;
    RowState state[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = consumer.row_sum[h];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (consumer.lane() % 4 == 0) shared.sum[parity][warpgroup][consumer.row() + 8 * h] = sum;
    }
    ptx::named_barrier_sync(kConsumersMeet, kConsumers);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = consumer.row() + 8 * h;
      state[h] = {consumer.row_max[h], shared.sum[parity][0][row] + shared.sum[parity][1][row]};
    }
    if (item.piece_count == 1) {
      store_output(item, state, warpgroup);
    } else {
      store_partial(item, state);
    }
  }

 private:
  __device__ __forceinline__ void store_output(const WorkItem& item, const RowState (&state)[2],
                                               int warpgroup) {
    const Rows<Element> rows{params, item};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int lane = consumer.lane(), row = consumer.row() + 8 * h;
      if (warpgroup == 0 && lane % 4 == 0) rows.store_lse(row, state[h]);
      const float inverse = state[h].sum > 0.f ? __fdividef(1.f, state[h].sum) : 0.f;
      const bool valid = row < item.rows;
      Element* target = rows.out(valid ? row : 0) + warpgroup * (kHeadDimV / 2);
#pragma unroll
      for (int four = 0; four < 8; ++four) store_four_tiles(four, h, lane, inverse, target, valid);
    }
  }

  // The four lanes that share a row hold two columns each of every tile of eight; transposed, each
  // holds eight columns of one tile and stores them at once.
  __device__ __forceinline__ void store_four_tiles(int four, int h, int lane, float inverse,
                                                   Element* target, bool valid) {
    uint32_t x[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int i = (four * 4 + t) * 4 + 2 * h;
      x[t] = pack<Element>(consumer.o[i] * inverse, consumer.o[i + 1] * inverse);
    }
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      const bool upper = lane & bit;
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        if (t & bit) continue;
        const uint32_t received = __shfl_xor_sync(~0u, upper ? x[t] : x[t | bit], bit);
        (upper ? x[t] : x[t | bit]) = received;
      }
    }
    if (valid) {
      *reinterpret_cast<uint4*>(target + (four * 4 + lane % 4) * 8) = uint4{x[0], x[1], x[2], x[3]};
    }
  }

  // In the accumulators' own order, so that every store is a full line; warps without a row store
  // nothing.
  __device__ __forceinline__ void store_partial(const WorkItem& item, const RowState (&state)[2]) {
    if (consumer.warp() * 16 >= item.rows) return;
    float* output = partial_output(params, blockIdx.x, item.piece_index == 0);
    if (threadIdx.x < kWarpgroup && consumer.lane() % 4 == 0) {
      const int row = consumer.row();
      partial_rows(output)[row] = state[0];
      partial_rows(output)[row + 8] = state[1];
    }
    float4* target = reinterpret_cast<float4*>(output) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      __stcg(target + i * kConsumers, float4{consumer.o[4 * i], consumer.o[4 * i + 1],
                                             consumer.o[4 * i + 2], consumer.o[4 * i + 3]});
    }
  }
};

}  // namespace flash_mla::cuda::decode_dense
