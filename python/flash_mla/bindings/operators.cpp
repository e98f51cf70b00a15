// The operators torch.ops.flash_mla.*: thin calls of the library. All checking of arguments is the
// library's.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "decode_call.h"
#include "flash_mla/flash_mla.h"
#include "tensor.h"
#include "torch_threads.h"
#include "workspace.h"

namespace flash_mla::python {
namespace {

constexpr std::int64_t kInt32Max = std::numeric_limits<std::int32_t>::max();

// What all forms of the decode operator share. The views borrow from the tensors, which outlive it.
struct DecodeCall {
  DecodeArgs args;
  DecodePlan plan;
  std::optional<Tensor> aligned_q;

  DecodeCall(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
             const Tensor& cache_seqlens, double softmax_scale, bool causal,
             const std::optional<Tensor>& metadata, const std::optional<Tensor>& num_splits,
             bool batch_invariant, bool validate) {
    args.q = view_of(q, "decode: q");
    args.kv_cache = view_of(kv_cache, "decode: k_cache");
    args.block_table = view_of(block_table, "decode: block_table");
    args.cache_seqlens = view_of(cache_seqlens, "decode: cache_seqlens");
    args.softmax_scale = softmax_scale;
    args.causal = causal;
    args.batch_invariant = batch_invariant;
    args.validate = validate;
    if (metadata) plan.metadata = view_of(*metadata, "decode: tile_scheduler_metadata");
    if (num_splits) plan.num_splits = view_of(*num_splits, "decode: num_splits");

    // Engines pass slices of larger tensors.
    if (!is_ready(args.q)) {
      aligned_q = new_tensor({args.q.shape[0], args.q.shape[1], args.q.shape[2], args.q.shape[3]},
                             args.q.dtype, args.q.device);
      torch::stable::copy_(*aligned_q, q);
      args.q = view_of(*aligned_q, "decode: q");
    }
  }

  void run(const Tensor& out, const Tensor& lse) {
    args.out = view_of(out, "decode: out");
    args.lse = view_of(lse, "decode: lse");
    run_decode(args, plan);
  }
};

std::tuple<Tensor, Tensor> decode(const Tensor& q, const Tensor& kv_cache,
                                  const Tensor& block_table, const Tensor& cache_seqlens,
                                  double softmax_scale, bool causal,
                                  const std::optional<Tensor>& metadata,
                                  const std::optional<Tensor>& num_splits, bool batch_invariant,
                                  bool validate) {
  DecodeCall call(q, kv_cache, block_table, cache_seqlens, softmax_scale, causal, metadata,
                  num_splits, batch_invariant, validate);
  const TensorView& q_view = call.args.q;
  std::int64_t b = q_view.shape[0], s_q = q_view.shape[1], h_q = q_view.shape[2];
  if (!has_results(q_view)) b = s_q = h_q = 0;
  Tensor out = new_tensor({b, s_q, h_q, kHeadDimV}, q_view.dtype, q_view.device);
  Tensor lse = new_tensor({b, h_q, s_q}, DType::kFp32, q_view.device);
  call.run(out, lse);
  return {out, lse};
}

void decode_out(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
                const Tensor& cache_seqlens, double softmax_scale, bool causal,
                const std::optional<Tensor>& metadata, const std::optional<Tensor>& num_splits,
                bool batch_invariant, bool validate, const Tensor& out, const Tensor& lse) {
  DecodeCall call(q, kv_cache, block_table, cache_seqlens, softmax_scale, causal, metadata,
                  num_splits, batch_invariant, validate);
  const TensorView view = view_of(out, "decode: out");
  if (has_aligned_rows(view)) {
    call.run(out, lse);
    return;
  }
  Tensor aligned = new_tensor({view.shape[0], view.shape[1], view.shape[2], view.shape[3]},
                              view.dtype, view.device);
  call.run(aligned, lse);
  torch::stable::copy_(const_cast<Tensor&>(out), aligned);
}

// Arguments of which only the shapes and the lengths matter, which is all that a plan depends on.
DecodeArgs plan_args(const TensorView& cache_seqlens, std::int64_t s_q, std::int64_t h_q,
                     std::int64_t h_kv, std::int64_t page_size) {
  const Device device = cache_seqlens.device;
  const std::int64_t b = cache_seqlens.shape[0];
  DecodeArgs args;
  args.q = contiguous_view(nullptr, DType::kBf16, device, {b, s_q, h_q, kHeadDimQk});
  args.kv_cache = contiguous_view(nullptr, DType::kBf16, device, {0, page_size, h_kv, kHeadDimQk});
  args.block_table = contiguous_view(nullptr, DType::kInt32, device,
                                     {b, kInt32Max / std::max<std::int64_t>(page_size, 1)});
  args.cache_seqlens = cache_seqlens;
  return args;
}

std::tuple<Tensor, Tensor> plan(const Tensor& cache_seqlens, std::int64_t s_q, std::int64_t h_q,
                                std::int64_t h_kv, std::int64_t page_size) {
  const DecodeArgs args =
      plan_args(view_of(cache_seqlens, "plan_decode: cache_seqlens"), s_q, h_q, h_kv, page_size);
  const Device device = args.q.device;
  std::int32_t num_parts = 0;
  check(plan_size(args, &num_parts));
  Tensor metadata = new_tensor({num_parts, kPlanRowInts}, DType::kInt32, device);
  Tensor num_splits = new_tensor({args.q.shape[0] + 1}, DType::kInt32, device);
  const DecodePlan plan = {view_of(metadata, "plan_decode: metadata"),
                           view_of(num_splits, "plan_decode: num_splits")};
  check(plan_decode(args, plan, current_stream(device)));
  return {metadata, num_splits};
}

void append_kv_cache(const Tensor& kv_c, const Tensor& k_pe, const Tensor& kv_cache,
                     const Tensor& slot_mapping) {
  const AppendKvArgs args = {view_of(kv_c, "append_kv: kv_c"), view_of(k_pe, "append_kv: k_pe"),
                             view_of(kv_cache, "append_kv: kv_cache"),
                             view_of(slot_mapping, "append_kv: slot_mapping")};
  follow_torch_threads(args.kv_cache.device);
  check(append_kv(args, current_stream(args.kv_cache.device)));
}

std::tuple<Tensor, Tensor> merge_states(const std::vector<Tensor>& outs,
                                        const std::vector<Tensor>& lses, bool fp32_out) {
  if (outs.empty() || outs.size() != lses.size()) {
    check(Status::error(StatusCode::kInvalidArgument,
                        "merge_states: %zu outs and %zu lses, wanted equally many, at least 1",
                        outs.size(), lses.size()));
  }
  std::vector<TensorView> out_views, lse_views;
  for (const Tensor& out : outs) out_views.push_back(view_of(out, "merge_states: outs"));
  for (const Tensor& lse : lses) lse_views.push_back(view_of(lse, "merge_states: lses"));
  const TensorView& first = out_views.front();
  Tensor out = new_tensor({first.shape[0], first.shape[1], first.shape[2], first.shape[3]},
                          fp32_out ? DType::kFp32 : first.dtype, first.device);
  Tensor lse =
      new_tensor({first.shape[0], first.shape[2], first.shape[1]}, DType::kFp32, first.device);
  MergeStatesArgs args;
  args.outs = out_views.data();
  args.lses = lse_views.data();
  args.num_parts = static_cast<std::int32_t>(outs.size());
  args.out = view_of(out, "merge_states: out");
  args.lse = view_of(lse, "merge_states: lse");
  follow_torch_threads(first.device);
  check(flash_mla::merge_states(args, current_stream(first.device)));
  return {out, lse};
}

}  // namespace
}  // namespace flash_mla::python

// A fragment, so that other owners of the namespace (the serving fork) do not bring down the
// process.
STABLE_TORCH_LIBRARY_FRAGMENT(flash_mla, library) {
  library.def(
      "decode(Tensor q, Tensor kv_cache, Tensor block_table, Tensor cache_seqlens, float "
      "softmax_scale, bool causal, "
      "Tensor? metadata, Tensor? num_splits, bool batch_invariant, bool validate) -> (Tensor out, "
      "Tensor lse)");
  library.def(
      "decode_out(Tensor q, Tensor kv_cache, Tensor block_table, Tensor cache_seqlens, float "
      "softmax_scale, "
      "bool causal, Tensor? metadata, Tensor? num_splits, bool batch_invariant, bool validate, "
      "Tensor(a!) out, "
      "Tensor(b!) lse) -> ()");
  library.def(
      "plan(Tensor cache_seqlens, int s_q, int h_q, int h_kv, int page_size) -> (Tensor metadata, "
      "Tensor num_splits)");
  library.def(
      "append_kv_cache(Tensor kv_c, Tensor k_pe, Tensor(a!) kv_cache, Tensor slot_mapping) -> ()");
  library.def(
      "merge_states(Tensor[] outs, Tensor[] lses, bool fp32_out) -> (Tensor out, Tensor lse)");
}

#define FLASH_MLA_IMPLEMENT(dispatch_key)                                            \
  STABLE_TORCH_LIBRARY_IMPL(flash_mla, dispatch_key, library) {                      \
    library.impl("decode", TORCH_BOX(&flash_mla::python::decode));                   \
    library.impl("decode_out", TORCH_BOX(&flash_mla::python::decode_out));           \
    library.impl("plan", TORCH_BOX(&flash_mla::python::plan));                       \
    library.impl("append_kv_cache", TORCH_BOX(&flash_mla::python::append_kv_cache)); \
    library.impl("merge_states", TORCH_BOX(&flash_mla::python::merge_states));       \
  }

FLASH_MLA_IMPLEMENT(CPU)
FLASH_MLA_IMPLEMENT(CUDA)
