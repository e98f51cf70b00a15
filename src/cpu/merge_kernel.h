// The merge of one row of merge_states (Flash-Decoding's). Written once, compiled once per
// instruction set.
#pragma once

#include "cpu/isa.h"
#include "cpu/simd.h"

namespace flash_mla::cpu {
namespace {

constexpr int kMaxMergeDim = 1024;

// A vector of a row of d elements, from element `at` on; past the end, 0.
template <class T>
FLASH_MLA_INLINE Vec load_head(const T* row, int at, int d) {
  if (at + kLanes <= d) return load(row + at);
  T padded[kLanes] = {};
  std::memcpy(padded, row + at, (d - at) * sizeof(T));
  return load(padded);
}

template <class T>
FLASH_MLA_INLINE void store_head(T* row, int at, int d, Vec x) {
  if (at + kLanes <= d) return store(row + at, x);
  T padded[kLanes];
  store(padded, x);
  std::memcpy(row + at, padded, (d - at) * sizeof(T));
}

// Everything of the row is read before anything is written, because out and lse may be those of a
// part.
template <class TIn, class TOut>
void merge_row_typed(const MergeStatesParams& params, std::int64_t b, std::int64_t s,
                     std::int64_t h) {
  float weights[kMergePartsLimit];
  float max_lse = -kInfinity;
  bool empty = true;
  for (int i = 0; i < params.num_parts; ++i) {
    const auto& part = params.parts[i];
    weights[i] = part.lse[b * part.stride_lse_b + h * part.stride_lse_h + s * part.stride_lse_s];
    if (weights[i] == kInfinity) weights[i] = -kInfinity;  // both mean: saw no key
    if (weights[i] > max_lse) max_lse = weights[i];
    if (weights[i] != -kInfinity) empty = false;
  }
  float total = 0.f;
  alignas(64) float merged[kMaxMergeDim] = {};
  for (int i = 0; i < params.num_parts; ++i) {
    if (weights[i] == -kInfinity) continue;
    const float weight = exp2((weights[i] - max_lse) * 1.44269504f);
    total += weight;
    const auto& part = params.parts[i];
    const TIn* row = static_cast<const TIn*>(part.out) + b * part.stride_out_b +
                     s * part.stride_out_s + h * part.stride_out_h;
    for (int d = 0; d < params.d; d += kLanes) {
      store(merged + d, load(merged + d) + load_head(row, d, params.d) * weight);
    }
  }
  TOut* out = static_cast<TOut*>(params.out) + b * params.stride_out_b + s * params.stride_out_s +
              h * params.stride_out_h;
  const float scale = empty ? 0.f : 1.f / total;
  for (int d = 0; d < params.d; d += kLanes) store_head(out, d, params.d, load(merged + d) * scale);
  if (params.lse != nullptr) {
    params.lse[b * params.stride_lse_b + h * params.stride_lse_h + s * params.stride_lse_s] =
        empty ? params.empty_lse : max_lse + __builtin_logf(total);
  }
}

void merge_row(const MergeStatesParams& params, std::int64_t row) {
  const std::int64_t h = row % params.h_q;
  const std::int64_t s = row / params.h_q % params.s_q;
  const std::int64_t b = row / params.h_q / params.s_q;
  const bool widen = params.out_dtype == DType::kFp32;
  if (params.dtype == DType::kBf16) {
    return widen ? merge_row_typed<Bf16, Fp32>(params, b, s, h)
                 : merge_row_typed<Bf16, Bf16>(params, b, s, h);
  }
  if (params.dtype == DType::kFp16) {
    return widen ? merge_row_typed<Fp16, Fp32>(params, b, s, h)
                 : merge_row_typed<Fp16, Fp16>(params, b, s, h);
  }
  merge_row_typed<Fp32, Fp32>(params, b, s, h);
}

}  // namespace
}  // namespace flash_mla::cpu
