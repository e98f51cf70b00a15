// The same as validation_test.cpp for append_kv and merge_states.
#include "validation.h"

namespace flash_mla::test {
namespace {

// --- append_kv -----------------------------------------------------------------------------------

AppendKvArgs valid_append(Device device) {
  return {contiguous_view(address(0x1000), DType::kBf16, device, {5, 512}),
          contiguous_view(address(0x2000), DType::kBf16, device, {5, 64}),
          contiguous_view(address(0x3000), DType::kBf16, device, {10, 64, 576}),
          contiguous_view(address(0x4000), DType::kInt64, device, {5})};
}

using AppendCheck = Check<AppendKvArgs>;
class AppendValidation : public testing::TestWithParam<AppendCheck> {};

TEST_P(AppendValidation, RefusesWithText) {
  AppendKvArgs args = valid_append(kCpu);
  GetParam().change(args);
  expect_status(append_kv(args, nullptr), GetParam().code,
                std::string("append_kv: ") + GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(
    Checks, AppendValidation,
    testing::ValuesIn(std::vector<AppendCheck>{
        {"kv_c_missing", [](AppendKvArgs& a) { a.kv_c = {}; }, kArgument,
         "kv_c is not given, wanted [t, 512]"},
        {"kv_c_dtype", [](AppendKvArgs& a) { a.kv_c.dtype = DType::kInt64; }, kType,
         "kv_c.dtype = int64, wanted bf16, fp16 or fp32"},
        {"kv_c_width", [](AppendKvArgs& a) { a.kv_c.shape[1] = 576; }, kArgument,
         "kv_c.shape[1] (512) = 576, wanted 512"},
        {"kv_c_stride", [](AppendKvArgs& a) { a.kv_c.stride[1] = 2; }, kArgument,
         "kv_c.stride[1] (512) = 2, wanted 1 (contiguous)"},
        {"kv_c_null", [](AppendKvArgs& a) { a.kv_c.data = nullptr; }, kArgument,
         "kv_c.data = null, wanted a pointer"},
        {"k_pe_dtype", [](AppendKvArgs& a) { a.k_pe.dtype = DType::kFp16; }, kType,
         "k_pe.dtype = fp16, wanted bf16 as kv_c"},
        {"k_pe_rows", [](AppendKvArgs& a) { a.k_pe.shape[0] = 4; }, kArgument,
         "k_pe.shape[0] (t) = 4, wanted 5 as kv_c"},
        {"k_pe_width", [](AppendKvArgs& a) { a.k_pe.shape[1] = 32; }, kArgument,
         "k_pe.shape[1] (64) = 32, wanted 64"},
        {"k_pe_null", [](AppendKvArgs& a) { a.k_pe.data = nullptr; }, kArgument,
         "k_pe.data = null, wanted a pointer"},
        {"kv_rank", [](AppendKvArgs& a) { a.kv_cache.rank = 2; }, kArgument,
         "kv_cache.rank = 2, wanted 4: [num_pages, page_size, h_kv, d_qk]"},
        {"kv_dtype", [](AppendKvArgs& a) { a.kv_cache.dtype = DType::kFp32; }, kType,
         "kv_cache.dtype = fp32, wanted bf16 as kv_c"},
        {"kv_fp8", [](AppendKvArgs& a) { a.kv_cache.dtype = DType::kFp8E4M3; }, kUnsupported,
         "kv_cache.dtype = fp8_e4m3, not supported by this build; wanted bf16, fp16 or fp32"},
        {"kv_page_size", [](AppendKvArgs& a) { a.kv_cache.shape[1] = 512; }, kArgument,
         "kv_cache.shape[1] (page_size) = 512, wanted 1 .. 256"},
        {"kv_width", [](AppendKvArgs& a) { a.kv_cache.shape[2] = 512; }, kArgument,
         "kv_cache.shape[2] (d_qk) = 512, this build supports {576}"},
        {"kv_heads",
         [](AppendKvArgs& a) {
           a.kv_cache = contiguous_view(address(0x3000), DType::kBf16, kCpu, {10, 64, 2, 576});
         },
         kArgument, "kv_cache.shape[2] (h_kv) = 2, wanted 1"},
        {"kv_overlap", [](AppendKvArgs& a) { a.kv_cache.stride[1] = 500; }, kArgument,
         "kv_cache.stride[1] (page_size) = 500, wanted more than 575: elements overlap"},
        {"kv_null", [](AppendKvArgs& a) { a.kv_cache.data = nullptr; }, kArgument,
         "kv_cache.data = null, wanted a pointer"},
        {"slots_dtype", [](AppendKvArgs& a) { a.slot_mapping.dtype = DType::kInt32; }, kType,
         "slot_mapping.dtype = int32, wanted int64"},
        {"slots_length", [](AppendKvArgs& a) { a.slot_mapping.shape[0] = 6; }, kArgument,
         "slot_mapping.shape[0] (t) = 6, wanted 5 as kv_c"},
        {"slots_stride", [](AppendKvArgs& a) { a.slot_mapping.stride[0] = 2; }, kArgument,
         "slot_mapping.stride[0] (t) = 2, wanted 1 (contiguous)"},
        {"slots_null", [](AppendKvArgs& a) { a.slot_mapping.data = nullptr; }, kArgument,
         "slot_mapping.data = null, wanted a pointer"},
        {"slots_misaligned", [](AppendKvArgs& a) { a.slot_mapping.data = address(0x4004); },
         kArgument, "slot_mapping.data = 0x4004, wanted a multiple of 8 bytes"},
    }),
    check_name<AppendKvArgs>);

TEST(AppendValidationRest, NoTokenIsLegal) {
  AppendKvArgs args = valid_append(kCpu);
  args.kv_c.shape[0] = args.k_pe.shape[0] = args.slot_mapping.shape[0] = 0;
  args.kv_c.data = args.k_pe.data = args.slot_mapping.data = nullptr;
  EXPECT_TRUE(append_kv(args, nullptr).ok());
}

// --- merge_states --------------------------------------------------------------------------------

struct MergeInput {
  TensorView outs[2], lses[2];
  MergeStatesArgs args;
};

MergeInput valid_merge() {
  MergeInput input;
  for (int part = 0; part < 2; ++part) {
    input.outs[part] = contiguous_view(address(0x1000), DType::kBf16, kCpu, {2, 3, 4, 512});
    input.lses[part] = contiguous_view(address(0x2000), DType::kFp32, kCpu, {2, 4, 3});
  }
  input.args.num_parts = 2;
  input.args.out = contiguous_view(address(0x3000), DType::kBf16, kCpu, {2, 3, 4, 512});
  input.args.lse = contiguous_view(address(0x4000), DType::kFp32, kCpu, {2, 4, 3});
  return input;
}

using MergeCheck = Check<MergeInput>;
class MergeValidation : public testing::TestWithParam<MergeCheck> {};

TEST_P(MergeValidation, RefusesWithText) {
  MergeInput input = valid_merge();
  input.args.outs = input.outs;
  input.args.lses = input.lses;
  GetParam().change(input);
  expect_status(merge_states(input.args, nullptr), GetParam().code,
                std::string("merge_states: ") + GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(
    Checks, MergeValidation,
    testing::ValuesIn(std::vector<MergeCheck>{
        {"no_part", [](MergeInput& i) { i.args.num_parts = 0; }, kArgument,
         "num_parts = 0, wanted 1 .. 64"},
        {"too_many_parts", [](MergeInput& i) { i.args.num_parts = 65; }, kArgument,
         "num_parts = 65, wanted 1 .. 64"},
        {"outs_null", [](MergeInput& i) { i.args.outs = nullptr; }, kArgument,
         "outs = null, wanted num_parts = 2 tensors"},
        {"lses_null", [](MergeInput& i) { i.args.lses = nullptr; }, kArgument,
         "lses = null, wanted num_parts = 2 tensors"},
        {"out_missing", [](MergeInput& i) { i.args.out = {}; }, kArgument,
         "out is not given, wanted [b, s_q, h_q, d_v]"},
        {"out_width", [](MergeInput& i) { i.args.out.shape[3] = 500; }, kArgument,
         "out.shape[3] (d_v) = 500, wanted a multiple of 8 up to 1024"},
        {"out_too_wide", [](MergeInput& i) { i.args.out.shape[3] = 1032; }, kArgument,
         "out.shape[3] (d_v) = 1032, wanted a multiple of 8 up to 1024"},
        {"out_dtype", [](MergeInput& i) { i.args.out.dtype = DType::kFp16; }, kType,
         "out.dtype = fp16, wanted bf16 as outs[0], or fp32"},
        {"out_null", [](MergeInput& i) { i.args.out.data = nullptr; }, kArgument,
         "out.data = null, wanted a pointer"},
        {"out_overlap", [](MergeInput& i) { i.args.out.stride[1] = 100; }, kArgument,
         "out.stride[1] (s_q) = 100, wanted more than 511: elements overlap"},
        {"lse_missing", [](MergeInput& i) { i.args.lse = {}; }, kArgument,
         "lse is not given, wanted [b, h_q, s_q]"},
        {"lse_dtype", [](MergeInput& i) { i.args.lse.dtype = DType::kBf16; }, kType,
         "lse.dtype = bf16, wanted fp32"},
        {"lse_shape", [](MergeInput& i) { i.args.lse.shape[1] = 5; }, kArgument,
         "lse.shape[1] (h_q) = 5, wanted 4 as out"},
        {"part_rank", [](MergeInput& i) { i.outs[1].rank = 3; }, kArgument,
         "outs[1].rank = 3, wanted 4: [b, s_q, h_q, d_v]"},
        {"part_dtype", [](MergeInput& i) { i.outs[1].dtype = DType::kFp16; }, kType,
         "outs[1].dtype = fp16, wanted bf16 as outs[0]"},
        {"part_shape", [](MergeInput& i) { i.outs[1].shape[0] = 1; }, kArgument,
         "outs[1].shape[0] (b) = 1, wanted 2 as out"},
        {"part_null", [](MergeInput& i) { i.outs[0].data = nullptr; }, kArgument,
         "outs[0].data = null, wanted a pointer"},
        {"part_lse_shape", [](MergeInput& i) { i.lses[1].shape[2] = 4; }, kArgument,
         "lses[1].shape[2] (s_q) = 4, wanted 3 as out"},
        {"part_lse_dtype", [](MergeInput& i) { i.lses[0].dtype = DType::kInt32; }, kType,
         "lses[0].dtype = int32, wanted fp32"},
        {"part_lse_null", [](MergeInput& i) { i.lses[1].data = nullptr; }, kArgument,
         "lses[1].data = null, wanted a pointer"},
        {"empty_lse", [](MergeInput& i) { i.args.empty_lse = static_cast<EmptyLse>(-1); },
         kArgument, "empty_lse = -1, wanted 0 (+inf) or 1 (-inf)"},
    }),
    check_name<MergeInput>);

// --- append_kv and CUDA --------------------------------------------------------------------------

TEST(WithoutCuda, AppendIsUnavailable) {
  if (built_with_cuda()) GTEST_SKIP() << "this build has the CUDA backend";
  expect_status(append_kv(valid_append(kCuda), nullptr), StatusCode::kUnavailable,
                std::string("append_kv: kv_c") + kNoBackend);
}

TEST(CudaValidation, AppendTakesNoFp32) {
  if (!built_with_cuda()) GTEST_SKIP() << "this build has no CUDA backend";
  AppendKvArgs args = valid_append(kCuda);
  args.kv_c.dtype = args.k_pe.dtype = args.kv_cache.dtype = DType::kFp32;
  expect_status(append_kv(args, nullptr), kUnsupported,
                "append_kv: kv_c.dtype = fp32, wanted bf16 or fp16 on a GPU; fp32 runs on the CPU");
}

}  // namespace
}  // namespace flash_mla::test
