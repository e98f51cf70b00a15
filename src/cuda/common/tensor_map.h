// Tensor maps (TMA descriptors) of a paged KV cache, made once per cache and remembered.
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
// The pointers are valid until the calling thread's next call: pass the maps by value
// (__grid_constant__). Engines call with one cache per layer, the same ones at every step, so what
// was made is remembered per thread, with no lock on the way.
// Errors: kCudaError (the driver refused), kInternal (out of host memory).
Status kv_tensor_maps(const DecodeParams& params, std::int32_t device, const CUtensorMap** part_map,
                      const CUtensorMap** rope_map) noexcept;

}  // namespace flash_mla::cuda
