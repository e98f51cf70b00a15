// Tensor maps (TMA descriptors) of a paged KV cache and of the queries. A map depends on address,
// extents, strides, box and element type alone, and an engine's tensors come back at every step, so
// each thread remembers what it has made, with no lock on the way.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "core/params.h"
#include "flash_mla/status.h"

namespace flash_mla::cuda {

// Rank-5 maps over kv_cache [num_pages, 64, h_kv, 576], bf16 or fp16, any strides that are
// multiples of 16 bytes. Coordinates, innermost first: column in the tile (0), row in the page,
// column tile (0 .. 8), kv head, page. Boxes are laid out in shared memory with the 128-byte
// swizzle, one 64 x 64 tile (8 KB) after another; a page number out of range loads zeros. A cache
// of no pages gets a map whose only legal coordinates lie in params.q, so that nothing out of
// bounds is read.
//
//   *part_map: box of 64 columns x 64 rows x 4 tiles, half of the latent part, 32 KB
//   *rope_map: box of 64 columns x 64 rows x 1 tile, for the RoPE part (tile 8), 8 KB
//
// Errors: kCudaError (the driver refused), kInternal (out of host memory).
Status kv_tensor_maps(const DecodeParams& params, CUtensorMap* part_map,
                      CUtensorMap* rope_map) noexcept;

// How the query rows of a kv head are numbered, so that 64 of them in a row are one box of q: query
// token by query token, `width` numbers each, of which the first h_q / h_kv are heads.
struct QueryRows {
  std::int32_t width = 1;
  bool dense = true;  // the numbers are one axis of q: s_q is 1, or h_kv is 1 and the tokens follow
                      // one another
  [[nodiscard]] std::int32_t count(const DecodeParams& params) const { return params.s_q * width; }
};
QueryRows query_rows(const DecodeParams& params) noexcept;

// Rank-5 maps over q [b, s_q, h_q, 576], any strides that are multiples of 16 bytes. Coordinates,
// innermost first: column in the tile (0), head, query token, column tile, request; dense rows: row
// instead of head, and 0. Boxes as those of a page; outside of q they read zeros.
// Errors: as kv_tensor_maps().
Status query_tensor_maps(const DecodeParams& params, const QueryRows& rows, CUtensorMap* part_map,
                         CUtensorMap* rope_map) noexcept;

}  // namespace flash_mla::cuda
