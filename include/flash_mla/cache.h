// Writing new tokens into a paged latent KV cache.
#pragma once

#include "flash_mla/decode.h"

namespace flash_mla {

// kv_cache[slot / page_size, slot % page_size] = concat(kv_c[i], k_pe[i]) for every i with slot =
// slot_mapping[i] >= 0.
//
// | tensor       | shape                                                     | dtype                   | layout                 |
// |--------------|-----------------------------------------------------------|-------------------------|------------------------|
// | kv_c         | [t, 512]                                                  | bf16, fp16 (CPU: fp32 too) | last axis contiguous |
// | k_pe         | [t, 64]                                                   | as kv_c                 | last axis contiguous   |
// | kv_cache     | [num_pages, page_size, 576] or [num_pages, page_size, 1, 576] | as kv_c             | last axis contiguous; written |
// | slot_mapping | [t]                                                       | int64                   | contiguous; negative skips the token |
//
// page_size 1..256. A slot that occurs twice keeps one of the two rows, whole, on the CPU the later
// one.
struct AppendKvArgs {
  TensorView kv_c;
  TensorView k_pe;
  TensorView kv_cache;
  TensorView slot_mapping;
};

// Asynchronous in `stream` on a GPU and graph safe; no allocation, one launch. A slot at or past
// num_pages * page_size is an error on the CPU (nothing is written) and skipped on a GPU, where
// only the device knows it. Errors: kInvalidArgument, kInvalidType, kUnavailable, kCudaError.
Status append_kv(const AppendKvArgs& args, StreamHandle stream) noexcept;

}  // namespace flash_mla
