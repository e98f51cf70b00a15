// Paged MLA decode: attention of s_q * h_q query rows against one latent KV cache.
//
//   out[i] = sum_j softmax_j(softmax_scale * <q[i], k[j]>) * k[j][0:512],   lse[i] = ln sum_j
//   exp(softmax_scale * <q[i], k[j]>)
//
// where k[j] is the 576-wide row (512 latent + 64 RoPE) of token j, found through the block table.
// Method: DeepSeek-V2 (arXiv:2405.04434, section 2.1, absorbed form), online softmax
// (FlashAttention, arXiv:2205.14135), split over the keys (Flash-Decoding) with partial results
// merged in the same launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "flash_mla/status.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

inline constexpr int kHeadDimQk = 576;  // d_qk
inline constexpr int kHeadDimV = 512;   // d_v
inline constexpr int kPlanRowInts = 8;  // columns of DecodePlan::metadata

// A CUDA stream as the driver knows it (cudaStream_t / CUstream); ignored by the CPU backend.
using StreamHandle = void*;

// What a query row that sees no key gets in `lse` (its `out` is 0).
enum class EmptyLse : std::int32_t { kPositiveInfinity = 0, kNegativeInfinity = 1 };

// Arguments of a decode. All tensors live on one device. Strides are in elements.
//
// | tensor        | shape                                | dtype            | layout                                                |
// |---------------|--------------------------------------|------------------|-------------------------------------------------------|
// | q             | [b, s_q, h_q, 576]                   | bf16, fp16 (CPU: fp32 too) | last axis contiguous; CUDA: base and strides multiples of 16 bytes |
// | kv_cache      | [num_pages, page_size, h_kv, 576]    | as q             | last axis contiguous; CUDA: page_size 64, base and other strides multiples of 16 bytes; CPU: page_size 1..256 |
// | block_table   | [b, max_pages]                       | int32            | last axis contiguous; page numbers, entries past a request's length are never read |
// | cache_seqlens | [b]                                  | int32            | contiguous; tokens of each request, 0 is legal         |
// | out           | [b, s_q, h_q, 512]                   | as q             | last axis contiguous; written                          |
// | lse           | [b, h_q, s_q]                        | fp32             | any strides; written; natural logarithm; optional      |
//
// h_q is a multiple of h_kv; query head h reads KV head h / (h_q / h_kv). A zero extent of b, s_q
// or h_q is legal and writes nothing.
struct DecodeArgs {
  TensorView q;
  TensorView kv_cache;
  TensorView block_table;
  TensorView cache_seqlens;
  TensorView out;
  TensorView lse;
  // NaN means the default, 576 ** -0.5. Any finite number is legal.
  double softmax_scale = std::numeric_limits<double>::quiet_NaN();
  // Bottom-right aligned: query i of s_q sees keys 0 .. cache_seqlens - s_q + i, inclusive.
  bool causal = false;
  EmptyLse empty_lse = EmptyLse::kPositiveInfinity;
  // One part per request: no request is split, so a request's result does not depend on what else
  // is in the batch.
  bool batch_invariant = false;
  // Opt-in: check on the device, before the decode, that lengths are in 0 .. max_pages * page_size
  // and page numbers in 0 .. num_pages - 1. Synchronises the stream; refused while the stream is
  // being captured. The CPU backend always checks.
  bool validate = false;
};

// A plan says how the work is cut into parts. It is a hint: decode() checks its shape, never trusts
// its contents, and reads the lengths again on the device, so a stale plan can never give a wrong
// result. One row of `metadata` means "do not split".
//
// | tensor     | shape          | dtype | contents                                                                       |
// |------------|----------------|-------|--------------------------------------------------------------------------------|
// | metadata   | [num_parts, 8] | int32 | one row a part: first request, first block, last request, end block in it, split index of the first request, 0, 0, 0 |
// | num_splits | [b + 1]        | int32 | prefix sums of the number of parts each request is cut into                      |
//
// Both contiguous and on the device of q.
struct DecodePlan {
  TensorView metadata;
  TensorView num_splits;
};

// Device memory that a decode on a GPU needs; the CPU needs none (both sizes are 0). `counters`
// must be initialised once by init_workspace(); every decode leaves it as it found it. `partials`
// needs no initialisation. Both are 256-byte aligned, on q's device, and belong to one stream at a
// time. They may be larger than asked for.
struct Workspace {
  void* counters = nullptr;
  std::size_t counters_size = 0;  // bytes
  void* partials = nullptr;
  std::size_t partials_size = 0;  // bytes
};

// Rows of DecodePlan::metadata for these arguments: depends on the device, s_q, h_q and h_kv, never
// on b or the lengths, and is at most the number of SMs; 1 on the CPU or when batch_invariant. Only
// the shapes, dtypes and device of q and kv_cache are read. Errors: kInvalidArgument, kUnsupported,
// kUnavailable.
Status plan_size(const DecodeArgs& args, std::int32_t* num_parts) noexcept;

// Bytes of both parts of the workspace: depends on the device and the shapes only. Errors as
// plan_size().
Status workspace_size(const DecodeArgs& args, std::size_t* counters_size,
                      std::size_t* partials_size) noexcept;

// Makes the counters of a workspace ready, in stream order. Call once, before the first decode that
// uses it. Errors: kCudaError, kInvalidArgument (null pointer, misaligned).
Status init_workspace(const Workspace& workspace, Device device, StreamHandle stream) noexcept;

// Writes a plan for the lengths in args.cache_seqlens, in stream order, on the device. Graph safe.
// decode() does not need it. out and lse may be undefined here.
Status plan_decode(const DecodeArgs& args, const DecodePlan& plan, StreamHandle stream) noexcept;

// Decodes. `plan` may be null. Everything is checked before the first launch: on an error nothing
// was written (with validate, too). Asynchronous in `stream` on a GPU; no allocation, no
// synchronisation, one launch; may be captured in a CUDA graph and replayed with other lengths,
// tables and contents. The tensors must not change while it runs: lengths that do spoil later calls
// with the same workspace, too. A call with the lengths of the last one
// with its workspace is shorter by a microsecond or more, if `partials` are as it left them.
// Bitwise reproducible for equal inputs on an
// equal device. The CPU backend returns when the result is there. Safe to call from several
// threads, with different workspaces. Errors: kInvalidArgument, kInvalidType, kUnsupported,
// kUnavailable, kCudaError.
Status decode(const DecodeArgs& args, const DecodePlan* plan, const Workspace& workspace,
              StreamHandle stream) noexcept;

// kOk when decode() would accept these arguments (the data pointers are not looked at), else the
// error it would return.
Status is_supported(const DecodeArgs& args) noexcept;

// One line that names the backend and the variant chosen for these shapes: "sm90 decode_dense bf16
// pair=1 parts=66 team=1". Truncated to size - 1 bytes and always terminated (size > 0). Errors as
// is_supported().
Status describe_decode(const DecodeArgs& args, char* text, std::size_t size) noexcept;

}  // namespace flash_mla
