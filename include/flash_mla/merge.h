// Merging partial attention results of the same queries over disjoint sets of keys (context
// parallel, shared prefix).
#pragma once

#include <cstdint>

#include "flash_mla/decode.h"

namespace flash_mla {

// Parts that one call merges at most. More are merged in several calls; keep the intermediate `out`
// in fp32 then.
inline constexpr int kMaxMergeParts = 64;

// lse = ln sum_p exp(lses[p]),  out = sum_p exp(lses[p] - lse) * outs[p]   (Flash-Decoding's
// merge).
//
// Shapes as decode writes them: each outs[p] and out is [b, s_q, h_q, d] with the last axis
// contiguous and any d that is a multiple of 8 up to 1024, each lses[p] and lse is [b, h_q, s_q]
// fp32 with any strides. outs are all of one dtype (bf16, fp16 or fp32); out has the same dtype or
// fp32. A part whose lse is +inf or -inf saw no key: its out is not read into the result. A row
// that no part saw gets out 0 and lse as `empty_lse` says. out may be one of outs and lse one of
// lses.
struct MergeStatesArgs {
  const TensorView* outs = nullptr;  // num_parts views, in host memory
  const TensorView* lses = nullptr;  // num_parts views, in host memory
  std::int32_t num_parts = 0;        // 1 .. kMaxMergeParts
  TensorView out;
  TensorView lse;
  EmptyLse empty_lse = EmptyLse::kPositiveInfinity;
};

// Asynchronous in `stream` on a GPU and graph safe; no allocation, one launch.
// Errors: kInvalidArgument, kInvalidType, kUnavailable, kCudaError.
Status merge_states(const MergeStatesArgs& args, StreamHandle stream) noexcept;

}  // namespace flash_mla
