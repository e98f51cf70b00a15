// What the backends receive: validated, flat parameter structs. Filled by src/api, read by src/cpu
// and src/cuda. Every stride is in elements and named tensor, then axis.
#pragma once

#include <cstdint>

#include "flash_mla/tensor.h"

namespace flash_mla {

struct DecodeParams {
  DType dtype = DType::kUndefined;  // of q, kv_cache and out
  std::int32_t b = 0, s_q = 0, h_q = 0, h_kv = 0;
  std::int32_t num_pages = 0, page_size = 0;
  std::int32_t max_pages =
      0;  // columns of block_table; lengths are clamped to max_pages * page_size
  float softmax_scale = 0.f;
  float empty_lse = 0.f;  // +inf or -inf
  bool causal = false;
  bool split = true;  // false: no request is cut, whatever it costs (batch invariant)

  const void* q = nullptr;  // [b, s_q, h_q, 576]
  std::int64_t stride_q_b = 0, stride_q_s = 0, stride_q_h = 0;
  const void* kv_cache =
      nullptr;  // [num_pages, page_size, h_kv, 576]; may be null when num_pages is 0
  std::int64_t stride_kv_page = 0, stride_kv_row = 0, stride_kv_head = 0;
  const std::int32_t* block_table = nullptr;  // [b, max_pages]
  std::int64_t stride_block_table_b = 0;
  const std::int32_t* cache_seqlens = nullptr;  // [b], contiguous
  void* out = nullptr;                          // [b, s_q, h_q, 512]
  std::int64_t stride_out_b = 0, stride_out_s = 0, stride_out_h = 0;
  float* lse = nullptr;  // [b, h_q, s_q]; null: not wanted
  std::int64_t stride_lse_b = 0, stride_lse_h = 0, stride_lse_s = 0;
};

struct PlanParams {
  std::int32_t* metadata = nullptr;    // [num_parts, 8]
  std::int32_t* num_splits = nullptr;  // [b + 1]
  std::int32_t num_parts = 0;
};

struct AppendKvParams {
  DType dtype = DType::kUndefined;
  std::int64_t t = 0;
  std::int64_t num_pages = 0;
  std::int32_t page_size = 0;
  const void* kv_c = nullptr;  // [t, 512]
  std::int64_t stride_kv_c_t = 0;
  const void* k_pe = nullptr;  // [t, 64]
  std::int64_t stride_k_pe_t = 0;
  void* kv_cache = nullptr;  // [num_pages, page_size, 576]
  std::int64_t stride_kv_page = 0, stride_kv_row = 0;
  const std::int64_t* slot_mapping = nullptr;  // [t]
};

inline constexpr int kMergePartsLimit = 64;  // public: kMaxMergeParts

struct MergeStatesParams {
  DType dtype = DType::kUndefined;      // of every outs[p]
  DType out_dtype = DType::kUndefined;  // dtype, or fp32
  std::int32_t num_parts = 0;
  std::int32_t b = 0, s_q = 0, h_q = 0, d = 0;
  float empty_lse = 0.f;
  struct Part {
    const void* out;
    const float* lse;
    std::int64_t stride_out_b, stride_out_s, stride_out_h;
    std::int64_t stride_lse_b, stride_lse_h, stride_lse_s;
  } parts[kMergePartsLimit];
  void* out = nullptr;
  std::int64_t stride_out_b = 0, stride_out_s = 0, stride_out_h = 0;
  float* lse = nullptr;
  std::int64_t stride_lse_b = 0, stride_lse_h = 0, stride_lse_s = 0;
};

}  // namespace flash_mla
