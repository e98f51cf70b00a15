// The kernels that exist once per instruction set, and the choice between them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/params.h"

namespace flash_mla::cpu {

inline constexpr int kMaxRows = 128;  // query rows that share one pass over the tokens, at most
inline constexpr int kPartialRowMultiple = 16;

// Query rows of one (request, kv head) that are worked on together. Row r of the (request, kv head)
// is query s = r / (h_q / h_kv) of head kv_head * (h_q / h_kv) + r % (h_q / h_kv).
struct RowGroup {
  std::int32_t request = 0, kv_head = 0;
  std::int32_t row_begin = 0, num_rows = 0;  // num_rows <= Kernels::max_rows
};

// Attention of a row group over some of its tokens, not normalised: sum = sum of 2 ** (score -
// max), out the same sum with the values. A row that saw no token has max -inf, sum 0, out 0. Rows
// up to the next multiple of kPartialRowMultiple may be written. All is 64-byte aligned.
struct Partial {
  float* max_log2;  // [rows]
  float* sum;       // [rows]
  float* out;       // [rows, 512]
};

// Written once (decode_kernel.h, merge_kernel.h), compiled once per instruction set, as simdjson
// does (Langdale and Lemire, arXiv:1902.08318).
struct Kernels {
  const char* name;
  // How the work is cut. A group of more rows reads and prepares its tokens less often, a longer
  // chunk has less to merge; what remains are fewer tasks.
  int max_rows;              // of a row group, at most kMaxRows
  int chunk_tokens;          // of a chunk, at least
  std::size_t scratch_size;  // bytes, 64-byte aligned, for each thread in decode_chunk
  // Tokens token_begin .. token_end - 1, of which each row takes those it may see.
  void (*decode_chunk)(const DecodeParams& params, const RowGroup& group, std::int32_t token_begin,
                       std::int32_t token_end, void* scratch, const Partial& partial);
  // Merges the parts of a group, in order, and writes rows row_begin .. row_end - 1 of the group to
  // out and lse.
  void (*finish)(const DecodeParams& params, const RowGroup& group, const Partial* parts,
                 std::int32_t num_parts, std::int32_t row_begin, std::int32_t row_end);
  // Merges row `row` of b * s_q * h_q.
  void (*merge_row)(const MergeStatesParams& params, std::int64_t row);
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAmxKernels;
#endif

// The best this machine runs, or a lesser one that FLASH_MLA_CPU_ISA names. Chosen at the first
// call.
const Kernels& kernels() noexcept;

// Keys that a query sees of a request with `seqlen` tokens, query `s` of s_q. NOTE: static, for the
// reason in simd.h.
static inline std::int32_t visible_tokens(const DecodeParams& params, std::int32_t seqlen,
                                          std::int32_t s) {
  if (!params.causal) return seqlen;
  const std::int64_t visible = std::int64_t{seqlen} - params.s_q + s + 1;
  return visible > 0 ? static_cast<std::int32_t>(visible) : 0;
}

}  // namespace flash_mla::cpu
