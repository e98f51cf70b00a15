// The kernels for AMX: tile products for bf16; fp16 and fp32 as with AVX-512.
//
// A tile is 16 rows of 64 bytes. The product of a tile of A (16 x 32 bf16) and one of B, whose row
// k holds the pairs (B[2k][n], B[2k + 1][n]), adds to 16 x 16 fp32. The products are laid out so
// that little has to be rearranged:
//   scores^T = keys x q^T   A: rows of the cache as they are; B: q, transposed once per chunk
//   out += p x values       A: probabilities, rounded to bf16; B: two tokens interleaved
// The scores are transposed back for the softmax. Like the GPU kernels, and unlike the other CPU
// kernels, this one rounds the probabilities to bf16.
#define FLASH_MLA_CPU_LANES 16
#define FLASH_MLA_CPU_ROW_TILE 6
#define FLASH_MLA_CPU_COLUMN_TILE 4
#include <immintrin.h>

#include <utility>

#include "cpu/decode_kernel.h"
#include "cpu/merge_kernel.h"

#if defined(__clang__)
#define FLASH_MLA_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define FLASH_MLA_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, IntVec{__VA_ARGS__})
#endif

namespace flash_mla::cpu {
namespace {

constexpr int kTileRows = 16;
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

// Exchanges lane i | kWidth of x with lane i of y, for every i without that bit.
template <int kWidth, int... i>
FLASH_MLA_INLINE void exchange(BitVec& x, BitVec& y, std::integer_sequence<int, i...>) {
  const BitVec old = x;
  x = FLASH_MLA_SHUFFLE(old, y, ((i & kWidth) ? 16 + i - kWidth : i)...);
  y = FLASH_MLA_SHUFFLE(old, y, ((i & kWidth) ? 16 + i : i + kWidth)...);
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

// to[j][i] = from[i][j] for 16 x 16 words; strides in bytes.
inline void transpose(const void* from, int from_stride, void* to, int to_stride) {
  BitVec rows[16];
  for (int i = 0; i < 16; ++i) {
    rows[i] = load_raw<BitVec>(static_cast<const char*>(from) + i * from_stride);
  }
  transpose(rows);
  for (int i = 0; i < 16; ++i) {
    std::memcpy(static_cast<char*>(to) + i * to_stride, &rows[i], sizeof rows[i]);
  }
}

class AmxProducts {
 public:
  static constexpr int kBlock = 128;
  static_assert(kPartialRowMultiple % kTileRows == 0);

  struct alignas(64) Scratch {
    float p[kMaxRows * kBlock];
    float correction[kMaxRows];
    Bf16 p_bf16[kMaxRows * kBlock];
    Bf16 keys[kBlock * kDimQk];
    // [token / 2][column], a pair of tokens in each word.
    std::uint32_t values[kBlock / 2 * kDimV];
    // [row / 16][d / 2][row % 16], a pair of neighbours in d in each word.
    std::uint32_t q[kMaxRows * kDimQk / 2];
    float tile[kTileRows * kTileRows];
  };

  static void load_queries(const DecodeParams& params, const RowGroup& group, Scratch& scratch) {
    // Rows up to the next whole tile are zero.
    alignas(64) static constexpr Bf16 kZeros[kDimQk] = {};
    for (int row = 0; row < group.num_rows; row += kTileRows) {
      const Bf16* rows[kTileRows];
      for (int r = 0; r < kTileRows; ++r) {
        rows[r] = row + r < group.num_rows ? query_row<Bf16>(params, group, row + r) : kZeros;
      }
      for (int d = 0; d < kDimQk; d += kTileDepth) {
        BitVec words[16];
        for (int r = 0; r < kTileRows; ++r) words[r] = load_raw<BitVec>(rows[r] + d);
        transpose(words);
        std::memcpy(scratch.q + (row / kTileRows * kDimQk + d) / 2 * kTileRows, words,
                    sizeof words);
      }
    }
    const int whole_rows = round_up(group.num_rows, kTileRows);
    std::memset(scratch.p_bf16 + group.num_rows * kBlock, 0,
                (whole_rows - group.num_rows) * kBlock * sizeof(Bf16));
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

  static void load_tokens(TokenReader<Bf16>& reader, int tokens, Scratch& scratch) {
    for (int t = 0; t < tokens; ++t) {
      std::memcpy(scratch.keys + t * kDimQk, reader.next(), kDimQk * sizeof(Bf16));
    }
    const int whole_tokens = round_up(tokens, kTileDepth);
    std::memset(scratch.keys + tokens * kDimQk, 0, (whole_tokens - tokens) * kDimQk * sizeof(Bf16));
    for (int t = 0; t < whole_tokens; t += 2) {
      const Bf16* pair = scratch.keys + t * kDimQk;
      for (int d = 0; d < kDimV; d += kLanes) {
        const BitVec even = __builtin_convertvector(load_raw<HalfBitVec>(pair + d), BitVec);
        const BitVec odd = __builtin_convertvector(load_raw<HalfBitVec>(pair + kDimQk + d), BitVec);
        const BitVec words = even | odd << 16;
        std::memcpy(scratch.values + t / 2 * kDimV + d, &words, sizeof words);
      }
    }
  }

  static void scores(int num_rows, int tokens, float scale, Scratch& scratch) {
    for (int t = 0; t < tokens; t += 2 * kTileRows) {
      int row = 0;
      for (; num_rows - row > kTileRows; row += 2 * kTileRows) score_tiles<2>(row, t, scratch);
      if (row < num_rows) score_tiles<1>(row, t, scratch);
    }
    for (int i = 0; i < num_rows * kBlock; i += kLanes) {
      store(scratch.p + i, load(scratch.p + i) * scale);
    }
  }

  static void accumulate(int num_rows, int tokens, Scratch& scratch, float* out) {
    for (int r = 0; r < num_rows; ++r) {
      for (int t = 0; t < kBlock; t += kLanes) {
        store(scratch.p_bf16 + r * kBlock + t, load(scratch.p + r * kBlock + t));
      }
      if (scratch.correction[r] == 1.f) continue;  // the maximum is the old one
      for (int d = 0; d < kDimV; d += kLanes) {
        store(out + r * kDimV + d, load(out + r * kDimV + d) * scratch.correction[r]);
      }
    }
    for (int column = 0; column < kDimV; column += 2 * kTileRows) {
      int row = 0;
      for (; num_rows - row > kTileRows; row += 2 * kTileRows) {
        value_tiles<2>(row, column, tokens, scratch, out);
      }
      if (row < num_rows) value_tiles<1>(row, column, tokens, scratch, out);
    }
  }

  static void release() { _tile_release(); }

 private:
  // Scores of 32 tokens and kRowTiles * 16 rows, not scaled.
  template <int kRowTiles>
  static void score_tiles(int row, int token, Scratch& scratch) {
    const Bf16* keys = scratch.keys + token * kDimQk;
    const std::uint32_t* q = scratch.q + row * kDimQk / 2;
    constexpr int kKeyStride = kDimQk * sizeof(Bf16);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int d = 0; d < kDimQk; d += kTileDepth) {
      _tile_loadd(4, keys + d, kKeyStride);
      _tile_loadd(5, keys + kTileRows * kDimQk + d, kKeyStride);
      _tile_loadd(6, q + d / 2 * kTileRows, kTileBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kRowTiles == 2) {
        _tile_loadd(7, q + (kDimQk + d) / 2 * kTileRows, kTileBytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    float* p = scratch.p + row * kBlock + token;
    constexpr int kStride = kBlock * sizeof(float);
    _tile_stored(0, scratch.tile, kTileBytes);
    transpose(scratch.tile, kTileBytes, p, kStride);
    _tile_stored(2, scratch.tile, kTileBytes);
    transpose(scratch.tile, kTileBytes, p + kTileRows, kStride);
    if constexpr (kRowTiles == 2) {
      p += kTileRows * kBlock;
      _tile_stored(1, scratch.tile, kTileBytes);
      transpose(scratch.tile, kTileBytes, p, kStride);
      _tile_stored(3, scratch.tile, kTileBytes);
      transpose(scratch.tile, kTileBytes, p + kTileRows, kStride);
    }
  }

  // Adds to kRowTiles * 16 rows and 32 columns of out.
  template <int kRowTiles>
  static void value_tiles(int row, int column, int tokens, Scratch& scratch, float* out) {
    const Bf16* p = scratch.p_bf16 + row * kBlock;
    const std::uint32_t* values = scratch.values + column;
    constexpr int kOutStride = kDimV * sizeof(float);
    constexpr int kPStride = kBlock * sizeof(Bf16);
    constexpr int kValueStride = kDimV * sizeof(std::uint32_t);
    float* const out0 = out + row * kDimV + column;
    float* const out1 = out0 + kTileRows * kDimV;
    _tile_loadd(0, out0, kOutStride);
    _tile_loadd(1, out0 + kTileRows, kOutStride);
    if constexpr (kRowTiles == 2) {
      _tile_loadd(2, out1, kOutStride);
      _tile_loadd(3, out1 + kTileRows, kOutStride);
    }
    for (int t = 0; t < tokens; t += kTileDepth) {
      _tile_loadd(4, p + t, kPStride);
      _tile_loadd(6, values + t / 2 * kDimV, kValueStride);
      _tile_loadd(7, values + t / 2 * kDimV + kTileRows, kValueStride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kRowTiles == 2) {
        _tile_loadd(5, p + kTileRows * kBlock + t, kPStride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, out0, kOutStride);
    _tile_stored(1, out0 + kTileRows, kOutStride);
    if constexpr (kRowTiles == 2) {
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
