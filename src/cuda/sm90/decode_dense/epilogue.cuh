// What becomes of the accumulators when an item is done: normalised output rows, or a partial
// result for the merge.
#pragma once

#include "cuda/sm90/decode_dense/output.cuh"

namespace flash_mla::cuda::decode_dense {

// A row that saw no key, and so has the sum 0, gets output 0.
__device__ __forceinline__ float inverse_or_zero(float sum) {
  return sum == 0.f ? 0.f : __fdividef(1.f, sum);
}

// Places of the tile's rows in out and lse.
template <typename Element>
struct Rows {
  const KernelParams& params;
  const WorkItem& item;

  // Padded numbers (row_width > heads_per_kv) are no rows.
  __device__ __forceinline__ bool valid(int row) const {
    return row < item.rows && (item.first_row + row) % params.row_width < params.heads_per_kv;
  }
  struct Index {
    int s, head;
  };
  __device__ __forceinline__ Index index(int row) const {
    const int r = item.first_row + row;
    return {r / params.row_width, item.head * params.heads_per_kv + r % params.row_width};
  }
  __device__ __forceinline__ Element* out(int row) const {
    const DecodeParams& decode = params.decode;
    const Index at = index(row);
    return static_cast<Element*>(decode.out) + item.request * decode.stride_out_b +
           at.s * decode.stride_out_s + at.head * decode.stride_out_h;
  }
  // `sum` 0: the row saw no key. (NaN among its scores gives NaN.)
  __device__ __forceinline__ void store_lse(int row, RowState state) const {
    const DecodeParams& decode = params.decode;
    if (decode.lse == nullptr || !valid(row)) return;
    constexpr float kLn2 = 0.693147180559945309f;
    const Index at = index(row);
    decode.lse[item.request * decode.stride_lse_b + at.head * decode.stride_lse_h +
               at.s * decode.stride_lse_s] =
        state.sum == 0.f ? decode.empty_lse : (state.max + __log2f(state.sum)) * kLn2;
  }
};

// Partial results of a CTA: slot 0 for pieces 1.. of an item, slot 1 for piece 0.
__device__ __forceinline__ float* partial_output(const KernelParams& params, int cta, int slot) {
  return reinterpret_cast<float*>(params.partials +
                                  static_cast<int64_t>(slot * gridDim.x + cta) * kPartialBytes);
}
__device__ __forceinline__ RowState* partial_rows(float* output) {
  return reinterpret_cast<RowState*>(output + kPartialFloats);
}

template <typename T>
struct Epilogue {
  using Element = typename T::Element;
  const Output<T>& output;
  const KernelParams& params;

  // Writes the item's rows of out and lse.
  __device__ __forceinline__ void store_output(const WorkItem& item) const {
    const Rows<Element> rows{params, item};
    const int warpgroup = ptx::thread_index() / kWarpgroup;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int lane = lane_index(), row = row_index() + 8 * h;
      const RowState state = output.state[h];
      if (warpgroup == 0 && lane % 4 == 0) rows.store_lse(row, state);
      if (row - lane / 4 >= item.rows) return;  // of no row of this warp
      const float inverse = inverse_or_zero(state.sum);
      const bool valid = rows.valid(row), odd = lane % 2;
      // Of two neighbouring tiles of eight columns a lane has two columns each. Even lanes take the
      // next two of the first tile from their neighbour for theirs of the second, so that the four
      // lanes of a row store 32 bytes, a whole sector, at once.
      Element* target = rows.out(valid ? row : 0) + warpgroup * (kHeadDimV / 2) +
                        (odd ? 6 + lane % 4 * 2 : lane % 4 * 2);
#pragma unroll
      for (int tile = 0; tile < 32; tile += 2) {
        const int i = tile * 4 + 2 * h;
        const uint32_t first = pack<Element>(output.at(i) * inverse, output.at(i + 1) * inverse);
        const uint32_t second =
            pack<Element>(output.at(i + 4) * inverse, output.at(i + 5) * inverse);
        const uint32_t other = __shfl_xor_sync(~0u, odd ? first : second, 1);
        if (valid) {
          *reinterpret_cast<uint2*>(target + tile * 8) =
              odd ? uint2{other, second} : uint2{first, other};
        }
      }
    }
  }

  // Every store of a warp is a unit; warps without a row store nothing.
  __device__ __forceinline__ void store_partial(const WorkItem& item) const {
    const int row = row_index(), lane = lane_index(), row_warp = row / 16;
    if (row_warp * 16 >= item.rows) return;
    const int side = static_cast<int>(ptx::thread_index() / kWarpgroup);
    float* partial = partial_output(params, blockIdx.x, item.piece_index == 0);
    if (side == 0 && lane % 4 == 0) {
      partial_rows(partial)[row] = output.state[0];
      partial_rows(partial)[row + 8] = output.state[1];
    }
    float4* target =
        reinterpret_cast<float4*>(partial) + (row_warp * kUnitsPerRowWarp + side) * 32 + lane;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      __stcg(target + i * 64, float4{output.at(4 * i), output.at(4 * i + 1), output.at(4 * i + 2),
                                     output.at(4 * i + 3)});
    }
  }
};

}  // namespace flash_mla::cuda::decode_dense
