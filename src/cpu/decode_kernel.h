// Decode of a row group over a run of tokens, and the merge of such runs. Written once, compiled
// once per instruction set.
//
// Tokens are taken a block at a time. Their rows are gathered through the block table and serve
// every query row of the group, as keys (576 wide) and as values (the first 512). Between the two
// products stands the online softmax (FlashAttention, arXiv:2205.14135) in base 2. Runs are merged
// as in Flash-Decoding.
//
// Who includes this defines FLASH_MLA_CPU_LANES, the lanes of a vector, and FLASH_MLA_CPU_ROW_TILE
// and FLASH_MLA_CPU_COLUMN_TILE, a tile of accumulators that all but fills the vector registers.
#pragma once

#include <cfloat>

#include "cpu/isa.h"
#include "cpu/simd.h"

namespace flash_mla::cpu {
namespace {

constexpr int kDimQk = 576, kDimV = 512;
constexpr int kRowTile = FLASH_MLA_CPU_ROW_TILE;
constexpr int kColumnTile = FLASH_MLA_CPU_COLUMN_TILE;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
static_assert(kDimV % (kColumnTile * kLanes) == 0);

FLASH_MLA_INLINE int round_up(int x, int multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

template <class T>
const T* query_row(const DecodeParams& params, const RowGroup& group, int row) {
  const std::int32_t heads = params.h_q / params.h_kv;
  const std::int64_t r = group.row_begin + row;
  return static_cast<const T*>(params.q) + group.request * params.stride_q_b +
         r / heads * params.stride_q_s + (group.kv_head * heads + r % heads) * params.stride_q_h;
}

// Walks over the tokens of a request, page by page.
template <class T>
class TokenReader {
 public:
  TokenReader(const DecodeParams& params, const RowGroup& group, std::int32_t token)
      : params_(params),
        head_(static_cast<const T*>(params.kv_cache) + group.kv_head * params.stride_kv_head),
        page_(params.block_table + group.request * params.stride_block_table_b +
              token / params.page_size),
        row_(token % params.page_size) {}

  const T* next() {
    if (row_ == params_.page_size) {
      ++page_;
      row_ = 0;
    }
    return head_ + *page_ * params_.stride_kv_page + row_++ * params_.stride_kv_row;
  }

 private:
  const DecodeParams& params_;
  const T* head_;
  const std::int32_t* page_;
  std::int32_t row_;
};

template <class T>
void to_fp32(const T* from, float* to) {
  for (int d = 0; d < kDimQk; d += kLanes) store(to + d, load(from + d));
}

// A block of a request's tokens, and the rows that look at it.
struct Block {
  const DecodeParams& params;
  const RowGroup& group;
  std::int32_t begin;
  int tokens;
  float scale_log2;

  // How many of the tokens a row sees: no fewer than the row before it.
  [[nodiscard]] int visible(int row) const {
    const std::int32_t heads = params.h_q / params.h_kv;
    const std::int32_t seqlen = params.cache_seqlens[group.request];
    const std::int32_t end = visible_tokens(params, seqlen, (group.row_begin + row) / heads);
    return end < begin ? 0 : end - begin < tokens ? end - begin : tokens;
  }
};

// Calls tile.operator()<kRows>(row) for whole tiles of rows, then for what is left.
template <int kRows, class Tile>
FLASH_MLA_INLINE void for_row_tiles(int row, int num_rows, Tile tile) {
  for (; row + kRows <= num_rows; row += kRows) tile.template operator()<kRows>(row);
  if constexpr (kRows > 1) {
    if (row < num_rows) for_row_tiles<kRows - 1>(row, num_rows, tile);
  }
}

// The two products in fp32, for any dtype. A block is brought into fp32 once, in L2. Both keep
// kRowTile x kColumnTile vectors of accumulators in registers.
template <class T>
class Fp32Products {
 public:
  static constexpr int kBlock = 64;  // tokens of a block
  static_assert(kBlock % kColumnTile == 0 && kBlock % kLanes == 0);

  struct alignas(64) Scratch {
    float q[kMaxRows * kDimQk];
    float kv[kBlock * kDimQk];
    float p[kMaxRows * kBlock];  // scores, then probabilities
    float correction[kMaxRows];  // what the row of `out` is multiplied with before the block
  };

  static void load_queries(const DecodeParams& params, const RowGroup& group, Scratch& scratch) {
    for (int r = 0; r < group.num_rows; ++r) {
      to_fp32(query_row<T>(params, group, r), scratch.q + r * kDimQk);
    }
  }

  // Rows past `tokens`, which a tile of scores may touch, are zero: what stands in the cache there
  // may be NaN.
  static void load_tokens(TokenReader<T>& reader, int tokens, Scratch& scratch) {
    for (int t = 0; t < tokens; ++t) to_fp32(reader.next(), scratch.kv + t * kDimQk);
    for (int t = tokens; t % kColumnTile != 0; ++t) {
      std::memset(scratch.kv + t * kDimQk, 0, kDimQk * sizeof(float));
    }
  }

  // p = scale * q x keys.
  static void scores(const Block& block, Scratch& scratch) {
    for_row_tiles<kRowTile>(0, block.group.num_rows, [&]<int kRows>(int row) {
      for (int t = 0; t < block.tokens; t += kColumnTile) {
        score_tile<kRows>(scratch.q + row * kDimQk, scratch.kv + t * kDimQk, block.scale_log2,
                          scratch.p + row * kBlock + t);
      }
    });
  }

  // Turns the scores into probabilities, and brings maximum and sum of every row up to date.
  static void softmax(const Block& block, Scratch& scratch, const Partial& partial) {
    for (int r = 0; r < block.group.num_rows; ++r) {
      scratch.correction[r] = softmax_row(scratch.p + r * kBlock, block.visible(r),
                                          &partial.max_log2[r], &partial.sum[r]);
    }
  }

  // out = correction * out + p x values.
  static void accumulate(const Block& block, Scratch& scratch, float* out) {
    for (int column = 0; column < kDimV; column += kColumnTile * kLanes) {
      for_row_tiles<kRowTile>(0, block.group.num_rows, [&]<int kRows>(int row) {
        value_tile<kRows>(scratch.p + row * kBlock, scratch.correction + row, scratch.kv + column,
                          block.tokens, out + row * kDimV + column);
      });
    }
  }

  // Gives back what load_queries took of the processor's state.
  static void release() {}

 private:
  // scores[row, token] = scale * <q[row], kv[token]> for kRows rows and kColumnTile tokens.
  template <int kRows>
  static void score_tile(const float* q, const float* kv, float scale, float* scores) {
    Vec sums[kRows][kColumnTile] = {};
    for (int d = 0; d < kDimQk; d += kLanes) {
      Vec key[kColumnTile];
      for (int t = 0; t < kColumnTile; ++t) key[t] = load(kv + t * kDimQk + d);
      for (int r = 0; r < kRows; ++r) {
        const Vec query = load(q + r * kDimQk + d);
        for (int t = 0; t < kColumnTile; ++t) sums[r][t] += query * key[t];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int t = 0; t < kColumnTile; ++t) scores[r * kBlock + t] = scale * sum(sums[r][t]);
    }
  }

  // Turns a row's scores of a block, of which it sees the first `visible`, into probabilities; the
  // rest become 0. Returns the factor that what the row summed up before has to be multiplied with.
  static float softmax_row(float* p, int visible, float* max_log2, float* sum_of_row) {
    for (int t = visible; t < kBlock; ++t) p[t] = -kInfinity;
    Vec largest = splat(*max_log2);
    for (int t = 0; t < kBlock; t += kLanes) largest = max(largest, load(p + t));
    const float new_max = max_lane(largest);
    const float finite_max = new_max == -kInfinity ? 0.f : new_max;  // -inf - -inf would be NaN
    Vec total = {};
    for (int t = 0; t < kBlock; t += kLanes) {
      const Vec weight = exp2(load(p + t) - finite_max);
      store(p + t, weight);
      total += weight;
    }
    const float correction = exp2(*max_log2 - finite_max);
    *max_log2 = new_max;
    *sum_of_row = *sum_of_row * correction + sum(total);
    return correction;
  }

  // out[row, columns] = correction[row] * out[row, columns] + sum of p[row, token] * kv[token,
  // columns] over the tokens, for kRows rows and kColumnTile vectors of columns.
  template <int kRows>
  static void value_tile(const float* p, const float* correction, const float* kv, int tokens,
                         float* out) {
    Vec sums[kRows][kColumnTile];
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumnTile; ++c) {
        sums[r][c] = load(out + r * kDimV + c * kLanes) * correction[r];
      }
    }
    for (int t = 0; t < tokens; ++t) {
      Vec value[kColumnTile];
      for (int c = 0; c < kColumnTile; ++c) value[c] = load(kv + t * kDimQk + c * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const Vec weight = splat(p[r * kBlock + t]);
        for (int c = 0; c < kColumnTile; ++c) sums[r][c] += weight * value[c];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumnTile; ++c) store(out + r * kDimV + c * kLanes, sums[r][c]);
    }
  }
};

template <class T, class Products>
void decode_tokens(const DecodeParams& params, const RowGroup& group, std::int32_t token_begin,
                   std::int32_t token_end, void* scratch_memory, const Partial& partial) {
  auto& scratch = *static_cast<typename Products::Scratch*>(scratch_memory);
  constexpr int kBlock = Products::kBlock;
  const int touched_rows = round_up(group.num_rows, kPartialRowMultiple);
  for (int r = 0; r < touched_rows; ++r) {
    partial.max_log2[r] = -kInfinity;
    partial.sum[r] = 0.f;
  }
  std::memset(partial.out, 0, sizeof(float) * kDimV * touched_rows);
  Products::load_queries(params, group, scratch);
  TokenReader<T> reader(params, group, token_begin);
  // Finite, so that zeros stay zero.
  float scale_log2 = params.softmax_scale * kLog2E;
  if (scale_log2 > FLT_MAX) scale_log2 = FLT_MAX;
  if (scale_log2 < -FLT_MAX) scale_log2 = -FLT_MAX;
  for (std::int32_t begin = token_begin; begin < token_end; begin += kBlock) {
    const int tokens = token_end - begin < kBlock ? token_end - begin : kBlock;
    const Block block = {params, group, begin, tokens, scale_log2};
    Products::load_tokens(reader, tokens, scratch);
    Products::scores(block, scratch);
    Products::softmax(block, scratch, partial);
    Products::accumulate(block, scratch, partial.out);
  }
  Products::release();
}

template <class T>
void finish_rows(const DecodeParams& params, const RowGroup& group, const Partial* parts,
                 std::int32_t num_parts, std::int32_t row_begin, std::int32_t row_end) {
  const std::int32_t heads = params.h_q / params.h_kv;
  for (int r = row_begin; r < row_end; ++r) {
    const std::int64_t s = (group.row_begin + r) / heads;
    const std::int64_t h = group.kv_head * heads + (group.row_begin + r) % heads;
    T* out = static_cast<T*>(params.out) + group.request * params.stride_out_b +
             s * params.stride_out_s + h * params.stride_out_h;
    float max_log2 = -kInfinity;
    for (int i = 0; i < num_parts; ++i) {
      if (parts[i].max_log2[r] > max_log2) max_log2 = parts[i].max_log2[r];
    }
    const float finite_max = max_log2 == -kInfinity ? 0.f : max_log2;
    float total = 0.f;
    for (int i = 0; i < num_parts; ++i) {
      total += parts[i].sum[r] * exp2(parts[i].max_log2[r] - finite_max);
    }
    const bool empty = visible_tokens(params, params.cache_seqlens[group.request],
                                      static_cast<std::int32_t>(s)) == 0;
    float merged[kDimV] = {};
    for (int i = 0; i < num_parts && !empty; ++i) {
      const float weight = exp2(parts[i].max_log2[r] - finite_max) / total;
      const float* part = parts[i].out + r * kDimV;
      for (int d = 0; d < kDimV; d += kLanes) {
        store(merged + d, load(merged + d) + load(part + d) * weight);
      }
    }
    for (int d = 0; d < kDimV; d += kLanes) store(out + d, load(merged + d));
    if (params.lse != nullptr) {
      params.lse[group.request * params.stride_lse_b + h * params.stride_lse_h +
                 s * params.stride_lse_s] =
          empty ? params.empty_lse : (max_log2 + __builtin_log2f(total)) * kLn2;
    }
  }
}

// Kernels::decode_chunk and its scratch_size, with an own way to multiply bf16 where there is one.
template <class Bf16Products = Fp32Products<Bf16>>
void decode_chunk(const DecodeParams& params, const RowGroup& group, std::int32_t token_begin,
                  std::int32_t token_end, void* scratch, const Partial& partial) {
  const auto run = params.dtype == DType::kBf16   ? decode_tokens<Bf16, Bf16Products>
                   : params.dtype == DType::kFp16 ? decode_tokens<Fp16, Fp32Products<Fp16>>
                                                  : decode_tokens<Fp32, Fp32Products<Fp32>>;
  run(params, group, token_begin, token_end, scratch, partial);
}

template <class Bf16Products = Fp32Products<Bf16>>
constexpr std::size_t kScratchSize = sizeof(typename Bf16Products::Scratch) >
                                             sizeof(Fp32Products<Fp32>::Scratch)
                                         ? sizeof(typename Bf16Products::Scratch)
                                         : sizeof(Fp32Products<Fp32>::Scratch);

void finish(const DecodeParams& params, const RowGroup& group, const Partial* parts,
            std::int32_t num_parts, std::int32_t row_begin, std::int32_t row_end) {
  const auto run = params.dtype == DType::kBf16   ? finish_rows<Bf16>
                   : params.dtype == DType::kFp16 ? finish_rows<Fp16>
                                                  : finish_rows<Fp32>;
  run(params, group, parts, num_parts, row_begin, row_end);
}

}  // namespace
}  // namespace flash_mla::cpu
