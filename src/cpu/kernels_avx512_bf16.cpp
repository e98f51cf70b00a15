// The kernels for AVX-512 BF16: products of pairs for bf16; fp16 and fp32 as with AVX-512.
//
// Neither keys nor values are copied or rearranged in memory:
//   scores^T = keys x q^T   a word of a key, in every lane, times panels of q
//   out += p x values       a word of p, in every lane, times 32 columns of two tokens, interleaved
//                           in registers: shuffles take ports that the products leave free
// bf16_pairs.h tells the rest.
//
// The tiles, measured on one core of an EPYC with Zen 4, whose limit is 236 GFLOPS at 3.69 GHz
// (bf16, s_kv = 4096; GFLOPS at h_q = 16 and 128): 195, 204. With 2 panels a tile of scores: 198,
// 197; with 12 tokens and 2 panels: 176, 198; with 4 rows a tile of out: 174, 180; with blocks of
// 128 tokens: 184, 194.
#define FLASH_MLA_CPU_LANES 16
#define FLASH_MLA_CPU_ROW_TILE 6
#define FLASH_MLA_CPU_COLUMN_TILE 4
#include "cpu/bf16_pairs.h"
#include "cpu/merge_kernel.h"

namespace flash_mla::cpu {
namespace {

// sums[i] += the product of the pairs in word i of x and of y.
FLASH_MLA_INLINE Vec add_products(Vec sums, BitVec x, BitVec y) {
  return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
}

FLASH_MLA_INLINE BitVec splat_word(const void* from) {
  return BitVec{} + load_raw<std::uint32_t>(from);
}

// NOTE: the tiles are functions of their own because GCC 12, where it inlines them, keeps the sums
// in memory: half the speed.
class Avx512Products : public PairOperands<512> {
  static constexpr int kPanelTile = 3, kTokenTile = 8;  // a tile of scores
  static constexpr int kOutRowTile = 8;                 // a tile of out: times 2 vectors of columns
  static constexpr int kFewRows = 8, kFewRowsTile = 4;
  static_assert(kBlock % kTokenTile == 0 && kPanelRows % kOutRowTile == 0);

 public:
  struct alignas(64) Scratch : Operands {
    // Behind the last there are zeros: for the rest of its tile, and for the next, which is
    // prefetched.
    const Bf16* tokens[kBlock + 2 * kTokenTile];
  };

  static void load_tokens(TokenReader<Bf16>& reader, int tokens, Scratch& scratch) {
    for (int t = 0; t < tokens; ++t) scratch.tokens[t] = reader.next();
    for (int t = tokens; t < tokens + 2 * kTokenTile; ++t) scratch.tokens[t] = kZeros;
  }

  static void scores(const Block& block, Scratch& scratch) {
    if (block.group.num_rows <= kFewRows) {
      std::memset(scratch.scores[0], 0, block.tokens * sizeof scratch.scores[0][0]);
      for_row_tiles<kFewRowsTile>(0, block.group.num_rows, [&]<int kRows>(int row) {
        few_rows_scores<kRows>(block, row, scratch);
      });
      return;
    }
    for (int t = 0; t < block.tokens; t += kTokenTile) {
      for_row_tiles<kPanelTile>(0, num_panels(block), [&]<int kPanels>(int panel) {
        score_tile<kPanels>(panel, t, scratch);
      });
    }
  }

  static void accumulate(const Block& block, Scratch& scratch, float* out) {
    for (int column = 0; column < kDimV; column += 2 * kLanes) {
      for_row_tiles<kOutRowTile>(0, block.group.num_rows, [&]<int kRows>(int row) {
        value_tile<kRows>(row, column, block.tokens, scratch, out);
      });
    }
  }

  static void release() {}

 private:
  // Scores of kTokenTile tokens and kPanels panels. The first panel's brings the next tokens into
  // L2.
  template <int kPanels>
  [[gnu::noinline]] static void score_tile(int panel, int token, Scratch& scratch) {
    constexpr int kLine = 32;  // bf16 of a cache line
    const Bf16* const* const next_keys = scratch.tokens + token + kTokenTile;
    const Bf16* keys[kTokenTile];
    for (int t = 0; t < kTokenTile; ++t) keys[t] = scratch.tokens[token + t];
    Vec sums[kTokenTile][kPanels] = {};
    for (int line = 0; line < kDimQk; line += kLine) {
      if (panel == 0) {
        for (int t = 0; t < kTokenTile; ++t) __builtin_prefetch(next_keys[t] + line, 0, 2);
      }
      for (int d = line; d < line + kLine; d += 2) {
        BitVec query[kPanels];
        for (int i = 0; i < kPanels; ++i) query[i] = load_raw<BitVec>(scratch.q[panel + i][d / 2]);
        for (int t = 0; t < kTokenTile; ++t) {
          const BitVec key = splat_word(keys[t] + d);
          for (int i = 0; i < kPanels; ++i) sums[t][i] = add_products(sums[t][i], key, query[i]);
        }
      }
    }
    for (int t = 0; t < kTokenTile; ++t) {
      for (int i = 0; i < kPanels; ++i) store(scratch.scores[panel + i][token + t], sums[t][i]);
    }
  }

  // Scores of kRows rows where they are so few that a panel would be half empty: here the lanes are
  // neighbours in d, and are summed up in the end.
  template <int kRows>
  [[gnu::noinline]] static void few_rows_scores(const Block& block, int row, Scratch& scratch) {
    constexpr int kTokens = 4;
    const Bf16* q[kRows];
    for (int r = 0; r < kRows; ++r) q[r] = query_row<Bf16>(block.params, block.group, row + r);
    for (int token = 0; token < block.tokens; token += kTokens) {
      const Bf16* const* const keys = scratch.tokens + token;
      Vec sums[kRows][kTokens] = {};
      for (int d = 0; d < kDimQk; d += 2 * kLanes) {
        BitVec key[kTokens];
        for (int t = 0; t < kTokens; ++t) key[t] = load_raw<BitVec>(keys[t] + d);
        for (int r = 0; r < kRows; ++r) {
          const BitVec query = load_raw<BitVec>(q[r] + d);
          for (int t = 0; t < kTokens; ++t) sums[r][t] = add_products(sums[r][t], query, key[t]);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        for (int t = 0; t < kTokens; ++t) scratch.scores[0][token + t][row + r] = sum(sums[r][t]);
      }
    }
  }

  // out = correction * out + p x values, for kRows rows of a panel and 2 vectors of columns.
  template <int kRows>
  [[gnu::noinline]] static void value_tile(int row, int column, int tokens, Scratch& scratch,
                                           float* out) {
    const std::uint32_t* const p = scratch.p[row / kPanelRows][0] + row % kPanelRows;
    out += row * kDimV + column;
    Vec sums[kRows][2];
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < 2; ++c) {
        sums[r][c] = load(out + r * kDimV + c * kLanes) * scratch.correction[row + r];
      }
    }
    for (int t = 0; t < tokens; t += 2) {
      const auto even = load_raw<Bf16Vec>(scratch.tokens[t] + column);
      const auto odd = load_raw<Bf16Vec>(scratch.tokens[t + 1] + column);
      const BitVec values[2] = {interleave<0, 32>(even, odd), interleave<16, 48>(even, odd)};
      for (int r = 0; r < kRows; ++r) {
        const BitVec weights = splat_word(p + t / 2 * kPanelRows + r);
        for (int c = 0; c < 2; ++c) sums[r][c] = add_products(sums[r][c], weights, values[c]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < 2; ++c) store(out + r * kDimV + c * kLanes, sums[r][c]);
    }
  }
};

}  // namespace

const Kernels kAvx512Bf16Kernels = {.name = "avx512_bf16",
                                    .max_rows = 64,
                                    .chunk_tokens = 512,
                                    .scratch_size = kScratchSize<Avx512Products>,
                                    .decode_chunk = decode_chunk<Avx512Products>,
                                    .finish = finish,
                                    .merge_row = merge_row};

}  // namespace flash_mla::cpu
