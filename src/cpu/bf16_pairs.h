// What the instruction sets that multiply pairs of bf16 have in common: how their operands lie, and
// the softmax.
//
// Their products add x[2 * k] * y[2 * k] + x[2 * k + 1] * y[2 * k + 1] to sums in fp32; the two
// neighbours make a word of 32 bits. They are laid out so that little has to be rearranged:
//   scores^T = keys x q^T   keys: rows of the cache as they are; q: transposed once per chunk
//   out += p x values       p: two tokens in a word, as the softmax leaves them; values: two tokens
//                           interleaved
// Rows are taken 16 at a time, a panel, one in each lane: the softmax needs no sum and no maximum
// over lanes.
//
// Like the GPU kernels, and unlike those of fp32, these round the probabilities to bf16 before they
// are multiplied. Their sum is that of the probabilities in fp32.
//
// NOTE: these instructions, and the one that rounds to bf16, take denormals for zero, operands and
// results alike, and round every sum to nearest even, whatever MXCSR says (Intel's manual; Zen 4
// does the same, 2026-11-24). Denormals are lost in the rounding of any sum that holds other
// numbers; a q or a cache of nothing but denormals counts as zeros.
#pragma once

#include <immintrin.h>

#include <utility>

#include "cpu/decode_kernel.h"

#if defined(__clang__)
#define FLASH_MLA_SHUFFLE(V, x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define FLASH_MLA_SHUFFLE(V, x, y, ...) __builtin_shuffle(x, y, V{__VA_ARGS__})
#endif

namespace flash_mla::cpu {
namespace {

static_assert(kLanes == 16);
constexpr int kPanelRows = kLanes;

typedef std::uint16_t Bf16Vec __attribute__((vector_size(kLanes * 4)));  // bits of 2 * kLanes

// Exchanges lane i | kWidth of x with lane i of y, for every i without that bit.
template <int kWidth, int... i>
FLASH_MLA_INLINE void exchange(BitVec& x, BitVec& y, std::integer_sequence<int, i...>) {
  const BitVec old = x;
  x = FLASH_MLA_SHUFFLE(IntVec, old, y, ((i & kWidth) ? 16 + i - kWidth : i)...);
  y = FLASH_MLA_SHUFFLE(IntVec, old, y, ((i & kWidth) ? 16 + i : i + kWidth)...);
}

// Transposes a square of 32-bit words, exchanging ever smaller blocks across the diagonal.
template <int kWidth = 8>
FLASH_MLA_INLINE void transpose(BitVec (&rows)[16]) {
  for (int i = 0; i < 16; ++i) {
    if ((i & kWidth) == 0) {
      exchange<kWidth>(rows[i], rows[i | kWidth], std::make_integer_sequence<int, 16>());
    }
  }
  if constexpr (kWidth > 1) transpose<kWidth / 2>(rows);
}

// to[j][i] = word j of row(i), for 16 rows of 16 words. They may be the same memory.
template <class Row>
FLASH_MLA_INLINE void transpose(Row row, std::uint32_t (*to)[16]) {
  BitVec rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = load_raw<BitVec>(row(i));
  transpose(rows);
  std::memcpy(to, rows, sizeof rows);
}

template <int kEven, int kOdd, int... i>
FLASH_MLA_INLINE BitVec interleave(Bf16Vec x, Bf16Vec y, std::integer_sequence<int, i...>) {
  return reinterpret_cast<BitVec>(
      FLASH_MLA_SHUFFLE(Bf16Vec, x, y, (i % 2 == 0 ? kEven + i / 2 : kOdd + i / 2)...));
}

// Word i is made of lanes kEven + i and kOdd + i of x and y, which count as one vector of 64.
template <int kEven, int kOdd>
FLASH_MLA_INLINE BitVec interleave(Bf16Vec x, Bf16Vec y) {
  return interleave<kEven, kOdd>(x, y, std::make_integer_sequence<int, 32>());
}

// The operands of blocks of kTokens tokens, but for keys and values.
template <int kTokens>
class PairOperands {
 public:
  static constexpr int kBlock = kTokens;
  static constexpr int kTokenMultiple = 32;  // p is written up to a multiple of this; the rest is 0
  static_assert(kBlock % kTokenMultiple == 0 && kMaxRows % kPanelRows == 0);
  static_assert(kPanelRows == kPartialRowMultiple);

  // [panel][..][row of the panel]
  struct alignas(64) Operands {
    std::uint32_t q[kMaxRows / kPanelRows][kDimQk / 2][kPanelRows];  // two neighbours in d
    float scores[kMaxRows / kPanelRows][kBlock][kPanelRows];
    std::uint32_t p[kMaxRows / kPanelRows][kBlock / 2][kPanelRows];
    float correction[kMaxRows];
  };

  // Rows up to the next whole panel are zero.
  static void load_queries(const DecodeParams& params, const RowGroup& group, Operands& operands) {
    for (int first = 0; first < group.num_rows; first += kPanelRows) {
      const Bf16* rows[kPanelRows];
      for (int r = 0; r < kPanelRows; ++r) {
        rows[r] = first + r < group.num_rows ? query_row<Bf16>(params, group, first + r) : kZeros;
      }
      for (int d = 0; d < kDimQk; d += 2 * kLanes) {
        transpose([&](int r) { return rows[r] + d; }, operands.q[first / kPanelRows] + d / 2);
      }
    }
  }

  // Scores, not scaled yet, into probabilities.
  static void softmax(const Block& block, Operands& operands, const Partial& partial) {
    for (int row = 0; row < block.group.num_rows; row += kPanelRows) {
      softmax_panel(block, row, operands.scores[row / kPanelRows], operands.p[row / kPanelRows],
                    operands.correction + row, partial.max_log2 + row, partial.sum + row);
    }
  }

 protected:
  static int num_panels(const Block& block) {
    return (block.group.num_rows + kPanelRows - 1) / kPanelRows;
  }

  alignas(64) static constexpr Bf16 kZeros[kDimQk] = {};  // stands for a row that there is not

 private:
  static void softmax_panel(const Block& block, int first_row, float (*scores)[kPanelRows],
                            std::uint32_t (*p)[kPanelRows], float* correction, float* max_log2,
                            float* sum_of_row) {
    const int tokens = round_up(block.tokens, kTokenMultiple);
    const Vec old_max = load(max_log2);
    Vec largest = old_max;
    const int seen_by_all = block.visible(first_row);
    for (int t = 0; t < seen_by_all; ++t) {
      const Vec score = load(scores[t]) * block.scale_log2;
      store(scores[t], score);
      largest = max(largest, score);
    }
    if (seen_by_all < tokens) {
      IntVec visible = {};
      for (int r = 0; r < kPanelRows; ++r) visible[r] = block.visible(first_row + r);
      for (int t = seen_by_all; t < tokens; ++t) {
        const Vec score = visible > t ? load(scores[t]) * block.scale_log2 : splat(-kInfinity);
        store(scores[t], score);
        largest = max(largest, score);
      }
    }
    const Vec finite_max = largest == -kInfinity ? Vec{} : largest;  // -inf - -inf would be NaN
    Vec even_total = {}, odd_total = {};
    for (int t = 0; t < tokens; t += 2) {
      const Vec even = exp2(load(scores[t]) - finite_max);
      const Vec odd = exp2(load(scores[t + 1]) - finite_max);
      even_total += even;
      odd_total += odd;
      const auto halves = reinterpret_cast<Bf16Vec>(_mm512_cvtne2ps_pbh(odd, even));
      const BitVec words = interleave<0, 16>(halves, halves);
      std::memcpy(p[t / 2], &words, sizeof words);
    }
    // Where nothing was summed up yet any factor is right, and 1 the least work.
    const Vec factor = old_max == -kInfinity ? splat(1.f) : exp2(old_max - finite_max);
    store(correction, factor);
    store(max_log2, largest);
    store(sum_of_row, load(sum_of_row) * factor + (even_total + odd_total));
  }
};

}  // namespace
}  // namespace flash_mla::cpu
