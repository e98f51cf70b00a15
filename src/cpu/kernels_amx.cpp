// The kernels for AMX: tile products for bf16; fp16 and fp32 as with AVX-512.
//
// A tile is 16 rows of 64 bytes. The product of a tile of A (16 x 32 bf16) and one of B, whose row
// k holds the pairs (B[2k][n], B[2k + 1][n]), adds to 16 x 16 fp32:
//   scores^T = keys x q^T   A: 16 tokens of keys; B: a panel of q
//   out += p x values       A: a panel of p, whose words are transposed for it; B: values, two
//                           tokens interleaved
// bf16_pairs.h tells the rest.
#define FLASH_MLA_CPU_LANES 16
#define FLASH_MLA_CPU_ROW_TILE 6
#define FLASH_MLA_CPU_COLUMN_TILE 4
#include "cpu/bf16_pairs.h"
#include "cpu/merge_kernel.h"

namespace flash_mla::cpu {
namespace {

constexpr int kTileRows = kPanelRows;
constexpr int kTileBytes = 64;  // of a row
constexpr int kTileDepth = 32;  // bf16 of a row

// The tile registers, by number, because the intrinsics take literals only: two tiles of A, 4 + i,
// times two of B, 6 + j, give four of C, 2 * i + j.
constexpr int kNumTiles = 8;

// Operand of LDTILECFG.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

// NOTE: GCC 12's intrinsics do not say that they read memory, and a store before them may move
// behind them.
FLASH_MLA_INLINE void finish_stores() { asm volatile("" : : : "memory"); }

class AmxProducts : public PairOperands<128> {
  static_assert(kTokenMultiple == kTileDepth);

  // The keys of 16 tokens: rows equally far apart.
  struct KeyTiles {
    const Bf16* rows;
    std::intptr_t stride;  // bytes
  };

 public:
  struct alignas(64) Scratch : Operands {
    KeyTiles keys[kBlock / kTileRows];
    Bf16 copied_keys[kBlock][kDimQk];
    // A pair of tokens in each word. With the spare words the rows of a tile do not compete for the
    // same lines of L1.
    std::uint32_t values[kBlock / 2][kDimV + kTileRows];
  };

  static void load_queries(const DecodeParams& params, const RowGroup& group, Scratch& scratch) {
    PairOperands::load_queries(params, group, scratch);
    TileConfig config;
    for (int tile = 0; tile < kNumTiles; ++tile) {
      config.row_bytes[tile] = kTileBytes;
      config.rows[tile] = kTileRows;
    }
    // NOTE: GCC 12's intrinsic names the first 8 bytes of the operand alone as read, and the stores
    // to the rest may be dropped: tiles of no size, and SIGILL at the first product (seen on a Xeon
    // with AMX, 2026-11-23).
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }

  // Tokens up to the next whole tile are zero.
  static void load_tokens(TokenReader<Bf16>& reader, int tokens, Scratch& scratch) {
    for (int first = 0; first < round_up(tokens, kTileDepth); first += kTileRows) {
      const Bf16* rows[kTileRows];
      for (int t = 0; t < kTileRows; ++t) rows[t] = first + t < tokens ? reader.next() : kZeros;
      for (int t = 0; t < kTileRows; t += 2) {
        interleave_rows(rows[t], rows[t + 1], scratch.values[(first + t) / 2]);
      }
      scratch.keys[first / kTileRows] = key_tiles(rows, scratch.copied_keys + first);
    }
  }

  static void scores(const Block& block, Scratch& scratch) {
    for (int t = 0; t < block.tokens; t += 2 * kTileRows) {
      for_row_tiles<2>(0, num_panels(block),
                       [&]<int kPanels>(int panel) { score_tiles<kPanels>(panel, t, scratch); });
    }
  }

  static void accumulate(const Block& block, Scratch& scratch, float* out) {
    // A tile of A holds 32 tokens of a row, not 16 rows of two tokens.
    for (int panel = 0; panel < num_panels(block); ++panel) {
      for (int t = 0; t < block.tokens; t += kTileDepth) {
        auto* const words = scratch.p[panel] + t / 2;
        transpose([&](int i) { return words[i]; }, words);
      }
    }
    for (int r = 0; r < block.group.num_rows; ++r) {
      if (scratch.correction[r] == 1.f) continue;  // the maximum is the old one
      for (int d = 0; d < kDimV; d += kLanes) {
        store(out + r * kDimV + d, load(out + r * kDimV + d) * scratch.correction[r]);
      }
    }
    for (int column = 0; column < kDimV; column += 2 * kTileRows) {
      for_row_tiles<2>(0, num_panels(block), [&]<int kPanels>(int panel) {
        value_tiles<kPanels>(panel, column, block.tokens, scratch, out);
      });
    }
  }

  static void release() { _tile_release(); }

 private:
  // The values of two tokens. Brings the rest of their rows into the caches too.
  static void interleave_rows(const Bf16* even_row, const Bf16* odd_row, std::uint32_t* words) {
    for (int d = 0; d < kDimV; d += 2 * kLanes) {
      const auto even = load_raw<Bf16Vec>(even_row + d), odd = load_raw<Bf16Vec>(odd_row + d);
      const BitVec low = interleave<0, 32>(even, odd), high = interleave<16, 48>(even, odd);
      std::memcpy(words + d, &low, sizeof low);
      std::memcpy(words + d + kLanes, &high, sizeof high);
    }
    for (int d = kDimV; d < kDimQk; d += kTileDepth) {
      __builtin_prefetch(even_row + d);
      __builtin_prefetch(odd_row + d);
    }
  }

  // The cache itself where the rows are equally far apart, as inside a page; else a copy.
  static KeyTiles key_tiles(const Bf16* const (&rows)[kTileRows], Bf16 (*copy)[kDimQk]) {
    const auto distance = [&](int t) {
      return reinterpret_cast<std::intptr_t>(rows[t]) -
             reinterpret_cast<std::intptr_t>(rows[t - 1]);
    };
    const std::intptr_t stride = distance(1);
    bool regular = true;
    for (int t = 2; t < kTileRows; ++t) regular = regular && distance(t) == stride;
    if (regular) return {rows[0], stride};
    for (int t = 0; t < kTileRows; ++t) std::memcpy(copy[t], rows[t], sizeof copy[t]);
    return {copy[0], sizeof copy[0]};
  }

  // Scores of 32 tokens and kPanels * 16 rows.
  template <int kPanels>
  static void score_tiles(int panel, int token, Scratch& scratch) {
    finish_stores();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const KeyTiles keys0 = scratch.keys[token / kTileRows];
    const KeyTiles keys1 = scratch.keys[token / kTileRows + 1];
    for (int d = 0; d < kDimQk; d += kTileDepth) {
      _tile_loadd(4, keys0.rows + d, keys0.stride);
      _tile_loadd(5, keys1.rows + d, keys1.stride);
      _tile_loadd(6, scratch.q[panel][d / 2], kTileBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kPanels == 2) {
        _tile_loadd(7, scratch.q[panel + 1][d / 2], kTileBytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, scratch.scores[panel][token], kTileBytes);
    _tile_stored(2, scratch.scores[panel][token + kTileRows], kTileBytes);
    if constexpr (kPanels == 2) {
      _tile_stored(1, scratch.scores[panel + 1][token], kTileBytes);
      _tile_stored(3, scratch.scores[panel + 1][token + kTileRows], kTileBytes);
    }
  }

  // Adds to kPanels * 16 rows and 32 columns of out.
  template <int kPanels>
  static void value_tiles(int panel, int column, int tokens, Scratch& scratch, float* out) {
    constexpr int kValueStride = sizeof scratch.values[0];
    constexpr int kOutStride = kDimV * sizeof(float);
    float* const out0 = out + panel * kTileRows * kDimV + column;
    float* const out1 = out0 + kTileRows * kDimV;
    finish_stores();
    _tile_loadd(0, out0, kOutStride);
    _tile_loadd(1, out0 + kTileRows, kOutStride);
    if constexpr (kPanels == 2) {
      _tile_loadd(2, out1, kOutStride);
      _tile_loadd(3, out1 + kTileRows, kOutStride);
    }
    for (int t = 0; t < tokens; t += kTileDepth) {
      _tile_loadd(4, scratch.p[panel][t / 2], kTileBytes);
      _tile_loadd(6, scratch.values[t / 2] + column, kValueStride);
      _tile_loadd(7, scratch.values[t / 2] + column + kTileRows, kValueStride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kPanels == 2) {
        _tile_loadd(5, scratch.p[panel + 1][t / 2], kTileBytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, out0, kOutStride);
    _tile_stored(1, out0 + kTileRows, kOutStride);
    if constexpr (kPanels == 2) {
      _tile_stored(2, out1, kOutStride);
      _tile_stored(3, out1 + kTileRows, kOutStride);
    }
  }
};

}  // namespace

const Kernels kAmxKernels = {.name = "amx",
                             .max_rows = 128,
                             .chunk_tokens = 512,
                             .scratch_size = kScratchSize<AmxProducts>,
                             .decode_chunk = decode_chunk<AmxProducts>,
                             .finish = finish,
                             .merge_row = merge_row};

}  // namespace flash_mla::cpu
