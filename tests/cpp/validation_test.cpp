// One test per check of the arguments of decodes, plans and workspaces, each asserting code and
// text. Where the check is of the GPU's
// wishes, the tensors claim to lie on a GPU: nothing is launched before all checks are done, so no
// GPU is needed.
#include "validation.h"

#include <cmath>
#include <limits>

namespace flash_mla::test {
namespace {

DecodeArgs valid_decode(Device device) {
  DecodeArgs args;
  args.q = contiguous_view(address(0x1000), DType::kBf16, device, {2, 3, 8, 576});
  args.kv_cache = contiguous_view(address(0x2000), DType::kBf16, device, {10, 64, 2, 576});
  args.block_table = contiguous_view(address(0x3000), DType::kInt32, device, {2, 4});
  args.cache_seqlens = contiguous_view(address(0x4000), DType::kInt32, device, {2});
  args.out = contiguous_view(address(0x5000), DType::kBf16, device, {2, 3, 8, 512});
  args.lse = contiguous_view(address(0x6000), DType::kFp32, device, {2, 8, 3});
  return args;
}

// --- decode --------------------------------------------------------------------------------------

using DecodeCheck = Check<DecodeArgs>;
class DecodeValidation : public testing::TestWithParam<DecodeCheck> {};

TEST_P(DecodeValidation, RefusesWithText) {
  DecodeArgs args = valid_decode(kCpu);
  GetParam().change(args);
  expect_status(decode(args, nullptr, {}, nullptr), GetParam().code, GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(
    Checks, DecodeValidation,
    testing::ValuesIn(std::vector<DecodeCheck>{
        {"q_missing", [](DecodeArgs& a) { a.q = {}; }, kArgument,
         "decode: q is not given, wanted [b, s_q, h_q, d_qk]"},
        {"q_rank", [](DecodeArgs& a) { a.q.rank = 3; }, kArgument,
         "decode: q.rank = 3, wanted 4: [b, s_q, h_q, d_qk]"},
        {"q_rank_over_limit", [](DecodeArgs& a) { a.q.rank = 1000; }, kArgument,
         "decode: q.rank = 1000, wanted 4: [b, s_q, h_q, d_qk]"},
        {"q_dtype", [](DecodeArgs& a) { a.q.dtype = DType::kInt32; }, kType,
         "decode: q.dtype = int32, wanted bf16, fp16 or fp32"},
        {"q_dtype_unknown", [](DecodeArgs& a) { a.q.dtype = static_cast<DType>(77); }, kType,
         "decode: q.dtype = 77, which is no DType"},
        {"q_fp8", [](DecodeArgs& a) { a.q.dtype = DType::kFp8E4M3; }, kUnsupported,
         "decode: q.dtype = fp8_e4m3, not supported by this build; wanted bf16, fp16 or fp32"},
        {"q_negative", [](DecodeArgs& a) { a.q.shape[0] = -1; }, kArgument,
         "decode: q.shape[0] (b) = -1, wanted 0 .. 2147483647"},
        {"q_over_32_bits", [](DecodeArgs& a) { a.q.shape[1] = 2147483648; }, kArgument,
         "decode: q.shape[1] (s_q) = 2147483648, wanted 0 .. 2147483647"},
        {"q_rows_over_32_bits", [](DecodeArgs& a) { a.q.shape[1] = 1 << 30; }, kArgument,
         "decode: q has 2 * 1073741824 * 8 rows (b * s_q * h_q), wanted at most 2147483647"},
        {"q_head_dim", [](DecodeArgs& a) { a.q.shape[3] = 512; }, kArgument,
         "decode: q.shape[3] (d_qk) = 512, this build supports {576}"},
        {"q_last_stride", [](DecodeArgs& a) { a.q.stride[3] = 2; }, kArgument,
         "decode: q.stride[3] (d_qk) = 2, wanted 1 (contiguous)"},
        {"q_negative_stride", [](DecodeArgs& a) { a.q.stride[0] = -576; }, kArgument,
         "decode: q.stride[0] (b) = -576, wanted 0 or more"},
        {"q_reach", [](DecodeArgs& a) { a.q.stride[1] = std::int64_t{1} << 61; }, kArgument,
         "decode: q.stride[1] (s_q) = 2305843009213693952: the tensor reaches over 2^63 bytes"},
        {"q_null", [](DecodeArgs& a) { a.q.data = nullptr; }, kArgument,
         "decode: q.data = null, wanted a pointer"},
        {"q_misaligned", [](DecodeArgs& a) { a.q.data = address(0x1001); }, kArgument,
         "decode: q.data = 0x1001, wanted a multiple of 2 bytes"},
        {"q_device_type", [](DecodeArgs& a) { a.q.device.type = static_cast<DeviceType>(9); },
         kArgument, "decode: q.device type = 9, wanted 0 (cpu) or 1 (cuda)"},
        {"q_device_index", [](DecodeArgs& a) { a.q.device.index = 1; }, kArgument,
         "decode: q.device index = 1, wanted 0 for the CPU"},
        {"kv_missing", [](DecodeArgs& a) { a.kv_cache = {}; }, kArgument,
         "decode: kv_cache is not given, wanted [num_pages, page_size, h_kv, d_qk]"},
        {"kv_rank", [](DecodeArgs& a) { a.kv_cache.rank = 3; }, kArgument,
         "decode: kv_cache.rank = 3, wanted 4: [num_pages, page_size, h_kv, d_qk]"},
        {"kv_dtype_differs", [](DecodeArgs& a) { a.kv_cache.dtype = DType::kFp16; }, kType,
         "decode: kv_cache.dtype = fp16, wanted bf16 as q"},
        {"kv_fp8", [](DecodeArgs& a) { a.kv_cache.dtype = DType::kFp8E4M3; }, kUnsupported,
         "decode: kv_cache.dtype = fp8_e4m3, not supported by this build; wanted bf16, fp16 or "
         "fp32"},
        {"kv_uint8", [](DecodeArgs& a) { a.kv_cache.dtype = DType::kUInt8; }, kType,
         "decode: kv_cache.dtype = uint8, wanted bf16, fp16 or fp32"},
        {"kv_head_dim", [](DecodeArgs& a) { a.kv_cache.shape[3] = 656; }, kArgument,
         "decode: kv_cache.shape[3] (d_qk) = 656, this build supports {576}"},
        {"kv_page_size_0", [](DecodeArgs& a) { a.kv_cache.shape[1] = 0; }, kArgument,
         "decode: kv_cache.shape[1] (page_size) = 0, wanted 1 .. 256"},
        {"kv_page_size_257", [](DecodeArgs& a) { a.kv_cache.shape[1] = 257; }, kArgument,
         "decode: kv_cache.shape[1] (page_size) = 257, wanted 1 .. 256"},
        {"kv_last_stride", [](DecodeArgs& a) { a.kv_cache.stride[3] = 0; }, kArgument,
         "decode: kv_cache.stride[3] (d_qk) = 0, wanted 1 (contiguous)"},
        {"kv_null", [](DecodeArgs& a) { a.kv_cache.data = nullptr; }, kArgument,
         "decode: kv_cache.data = null, wanted a pointer"},
        {"h_kv_0", [](DecodeArgs& a) { a.kv_cache.shape[2] = 0; }, kArgument,
         "decode: q.shape[2] (h_q) = 8, wanted a multiple of kv_cache.shape[2] (h_kv) = 0"},
        {"h_kv_no_divisor", [](DecodeArgs& a) { a.kv_cache.shape[2] = 3; }, kArgument,
         "decode: q.shape[2] (h_q) = 8, wanted a multiple of kv_cache.shape[2] (h_kv) = 3"},
        {"kv_other_device", [](DecodeArgs& a) { a.kv_cache.device.index = 2; }, kArgument,
         "decode: kv_cache.device index = 2, wanted 0 for the CPU"},
        {"table_missing", [](DecodeArgs& a) { a.block_table = {}; }, kArgument,
         "decode: block_table is not given, wanted [b, max_pages]"},
        {"table_dtype", [](DecodeArgs& a) { a.block_table.dtype = DType::kInt64; }, kType,
         "decode: block_table.dtype = int64, wanted int32"},
        {"table_rows", [](DecodeArgs& a) { a.block_table.shape[0] = 3; }, kArgument,
         "decode: block_table.shape[0] (b) = 3, wanted 2 as q"},
        {"table_columns", [](DecodeArgs& a) { a.block_table.shape[1] = 1 << 26; }, kArgument,
         "decode: block_table.shape[1] (max_pages) = 67108864, wanted at most 33554431: max_pages "
         "* page_size has to fit 32 bits"},
        {"table_last_stride", [](DecodeArgs& a) { a.block_table.stride[1] = 2; }, kArgument,
         "decode: block_table.stride[1] (max_pages) = 2, wanted 1 (contiguous)"},
        {"table_null", [](DecodeArgs& a) { a.block_table.data = nullptr; }, kArgument,
         "decode: block_table.data = null, wanted a pointer"},
        {"table_misaligned", [](DecodeArgs& a) { a.block_table.data = address(0x3002); }, kArgument,
         "decode: block_table.data = 0x3002, wanted a multiple of 4 bytes"},
        {"lengths_missing", [](DecodeArgs& a) { a.cache_seqlens = {}; }, kArgument,
         "decode: cache_seqlens is not given, wanted [b]"},
        {"lengths_rank", [](DecodeArgs& a) { a.cache_seqlens.rank = 2; }, kArgument,
         "decode: cache_seqlens.rank = 2, wanted 1: [b]"},
        {"lengths_dtype", [](DecodeArgs& a) { a.cache_seqlens.dtype = DType::kFp32; }, kType,
         "decode: cache_seqlens.dtype = fp32, wanted int32"},
        {"lengths_rows", [](DecodeArgs& a) { a.cache_seqlens.shape[0] = 1; }, kArgument,
         "decode: cache_seqlens.shape[0] (b) = 1, wanted 2 as q"},
        {"lengths_stride", [](DecodeArgs& a) { a.cache_seqlens.stride[0] = 2; }, kArgument,
         "decode: cache_seqlens.stride[0] (b) = 2, wanted 1 (contiguous)"},
        {"lengths_null", [](DecodeArgs& a) { a.cache_seqlens.data = nullptr; }, kArgument,
         "decode: cache_seqlens.data = null, wanted a pointer"},
        {"out_missing", [](DecodeArgs& a) { a.out = {}; }, kArgument,
         "decode: out is not given, wanted [b, s_q, h_q, d_v]"},
        {"out_dtype", [](DecodeArgs& a) { a.out.dtype = DType::kFp32; }, kType,
         "decode: out.dtype = fp32, wanted bf16 as q"},
        {"out_rows", [](DecodeArgs& a) { a.out.shape[1] = 4; }, kArgument,
         "decode: out.shape[1] (s_q) = 4, wanted 3 as q"},
        {"out_head_dim", [](DecodeArgs& a) { a.out.shape[3] = 576; }, kArgument,
         "decode: out.shape[3] (d_v) = 576, this build supports {512}"},
        {"out_last_stride", [](DecodeArgs& a) { a.out.stride[3] = 3; }, kArgument,
         "decode: out.stride[3] (d_v) = 3, wanted 1 (contiguous)"},
        {"out_zero_stride", [](DecodeArgs& a) { a.out.stride[0] = 0; }, kArgument,
         "decode: out.stride[0] (b) = 0, wanted more than 0: elements overlap"},
        {"out_overlap", [](DecodeArgs& a) { a.out.stride[2] = 511; }, kArgument,
         "decode: out.stride[2] (h_q) = 511, wanted more than 511: elements overlap"},
        {"out_null", [](DecodeArgs& a) { a.out.data = nullptr; }, kArgument,
         "decode: out.data = null, wanted a pointer"},
        {"lse_rank", [](DecodeArgs& a) { a.lse.rank = 2; }, kArgument,
         "decode: lse.rank = 2, wanted 3: [b, h_q, s_q]"},
        {"lse_dtype", [](DecodeArgs& a) { a.lse.dtype = DType::kBf16; }, kType,
         "decode: lse.dtype = bf16, wanted fp32"},
        {"lse_shape", [](DecodeArgs& a) { std::swap(a.lse.shape[1], a.lse.shape[2]); }, kArgument,
         "decode: lse.shape[1] (h_q) = 3, wanted 8 as q"},
        {"lse_overlap", [](DecodeArgs& a) { a.lse.stride[1] = 2; }, kArgument,
         "decode: lse.stride[1] (h_q) = 2, wanted more than 2: elements overlap"},
        {"lse_null", [](DecodeArgs& a) { a.lse.data = nullptr; }, kArgument,
         "decode: lse.data = null, wanted a pointer"},
        {"lse_misaligned", [](DecodeArgs& a) { a.lse.data = address(0x6002); }, kArgument,
         "decode: lse.data = 0x6002, wanted a multiple of 4 bytes"},
        {"scale_infinite", [](DecodeArgs& a) { a.softmax_scale = -HUGE_VAL; }, kArgument,
         "decode: softmax_scale = -inf, wanted a finite 32-bit float"},
        {"scale_over_fp32", [](DecodeArgs& a) { a.softmax_scale = 1e39; }, kArgument,
         "decode: softmax_scale = 1e+39, wanted a finite 32-bit float"},
        {"empty_lse", [](DecodeArgs& a) { a.empty_lse = static_cast<EmptyLse>(2); }, kArgument,
         "decode: empty_lse = 2, wanted 0 (+inf) or 1 (-inf)"},
    }),
    check_name<DecodeArgs>);

TEST(DecodeValidationRest, StridesOfAxesOfOneAreFree) {
  DecodeArgs args = valid_decode(kCpu);
  args.q.shape[0] = args.block_table.shape[0] = args.cache_seqlens.shape[0] = 1;
  args.out.shape[0] = args.lse.shape[0] = 1;
  args.q.stride[0] = args.out.stride[0] = -kHuge;
  args.block_table.stride[0] = args.cache_seqlens.stride[0] = kHuge;
  EXPECT_TRUE(is_supported(args).ok()) << is_supported(args).message();
}

TEST(DecodeValidationRest, EveryFunctionNamesItself) {
  DecodeArgs args = valid_decode(kCpu);
  args.q.shape[3] = 64;
  const std::string rest = ": q.shape[3] (d_qk) = 64, this build supports {576}";
  std::int32_t parts = -7;
  std::size_t counters = 7, partials = 7;
  char text[16] = "unchanged";
  expect_status(plan_size(args, &parts), kArgument, "plan_size" + rest);
  expect_status(workspace_size(args, &counters, &partials), kArgument, "workspace_size" + rest);
  expect_status(plan_decode(args, {}, nullptr), kArgument, "plan_decode" + rest);
  expect_status(is_supported(args), kArgument, "is_supported" + rest);
  expect_status(describe_decode(args, text, sizeof(text)), kArgument, "describe_decode" + rest);
  EXPECT_EQ(parts, -7);
  EXPECT_EQ(counters + partials, 14u);
  EXPECT_STREQ(text, "unchanged");
}

TEST(DecodeValidationRest, NullResults) {
  const DecodeArgs args = valid_decode(kCpu);
  std::size_t size = 0;
  char text[8];
  expect_status(plan_size(args, nullptr), kArgument,
                "plan_size: num_parts = null, wanted a pointer");
  expect_status(workspace_size(args, nullptr, &size), kArgument,
                "workspace_size: counters_size = null, wanted a pointer");
  expect_status(workspace_size(args, &size, nullptr), kArgument,
                "workspace_size: partials_size = null, wanted a pointer");
  expect_status(describe_decode(args, nullptr, 5), kArgument,
                "describe_decode: text = null, wanted a pointer");
  expect_status(describe_decode(args, text, 0), kArgument,
                "describe_decode: size = 0, wanted 1 or more");
}

// --- Plans and workspaces ------------------------------------------------------------------------

struct Plan {
  DecodePlan plan = {contiguous_view(address(0x7000), DType::kInt32, kCpu, {1, 8}),
                     contiguous_view(address(0x8000), DType::kInt32, kCpu, {3})};
};

using PlanCheck = Check<DecodePlan>;
class PlanValidation : public testing::TestWithParam<PlanCheck> {};

TEST_P(PlanValidation, RefusesWithText) {
  DecodePlan plan = Plan().plan;
  GetParam().change(plan);
  const DecodeArgs args = valid_decode(kCpu);
  const std::string rest = GetParam().message;
  expect_status(decode(args, &plan, {}, nullptr), GetParam().code, "decode: " + rest);
  expect_status(plan_decode(args, plan, nullptr), GetParam().code, "plan_decode: " + rest);
}

INSTANTIATE_TEST_SUITE_P(
    Checks, PlanValidation,
    testing::ValuesIn(std::vector<PlanCheck>{
        {"missing", [](DecodePlan& p) { p.metadata = {}; }, kArgument,
         "plan.metadata is not given, wanted [num_parts, 8]"},
        {"rank", [](DecodePlan& p) { p.metadata.rank = 1; }, kArgument,
         "plan.metadata.rank = 1, wanted 2: [num_parts, 8]"},
        {"dtype", [](DecodePlan& p) { p.metadata.dtype = DType::kInt64; }, kType,
         "plan.metadata.dtype = int64, wanted int32"},
        {"columns", [](DecodePlan& p) { p.metadata.shape[1] = 7; }, kArgument,
         "plan.metadata.shape[1] (8) = 7, wanted 8"},
        {"no_row", [](DecodePlan& p) { p.metadata.shape[0] = 0; }, kArgument,
         "plan.metadata.shape[0] (num_parts) = 0, wanted 1 or more"},
        {"row_stride",
         [](DecodePlan& p) {
           p.metadata.shape[0] = 4;
           p.metadata.stride[0] = 16;
         },
         kArgument, "plan.metadata.stride[0] (num_parts) = 16, wanted 8 (contiguous)"},
        {"null", [](DecodePlan& p) { p.metadata.data = nullptr; }, kArgument,
         "plan.metadata.data = null, wanted a pointer"},
        {"device_index", [](DecodePlan& p) { p.metadata.device.index = 3; }, kArgument,
         "plan.metadata.device index = 3, wanted 0 for the CPU"},
        {"splits_length", [](DecodePlan& p) { p.num_splits.shape[0] = 2; }, kArgument,
         "plan.num_splits.shape[0] (b + 1) = 2, wanted 3"},
        {"splits_dtype", [](DecodePlan& p) { p.num_splits.dtype = DType::kFp32; }, kType,
         "plan.num_splits.dtype = fp32, wanted int32"},
        {"splits_null", [](DecodePlan& p) { p.num_splits.data = nullptr; }, kArgument,
         "plan.num_splits.data = null, wanted a pointer"},
    }),
    check_name<DecodePlan>);

TEST(PlanValidationRest, PlanDecodeWantsBothTensorsAndItsOwnRows) {
  DecodePlan plan = Plan().plan;
  plan.num_splits = {};
  expect_status(plan_decode(valid_decode(kCpu), plan, nullptr), kArgument,
                "plan_decode: plan.num_splits is not given, wanted [b + 1]");
  plan = Plan().plan;
  plan.metadata = contiguous_view(address(0x7000), DType::kInt32, kCpu, {4, 8});
  expect_status(plan_decode(valid_decode(kCpu), plan, nullptr), kArgument,
                "plan_decode: plan.metadata.shape[0] (num_parts) = 4, wanted 1 (see plan_size)");
}

TEST(WorkspaceValidation, RefusesWithText) {
  Workspace workspace = {address(0x1000), 256, nullptr, 0};
  EXPECT_TRUE(init_workspace(workspace, kCpu, nullptr).ok());
  workspace.counters = address(0x1080);
  expect_status(init_workspace(workspace, kCpu, nullptr), kArgument,
                "init_workspace: workspace.counters = 0x1080, wanted a multiple of 256 bytes");
  workspace = {nullptr, 256, nullptr, 0};
  expect_status(init_workspace(workspace, kCpu, nullptr), kArgument,
                "init_workspace: workspace.counters = null, wanted a pointer to 256 bytes");
  workspace = {address(0x1000), 256, address(0x2004), 1000};
  expect_status(init_workspace(workspace, kCpu, nullptr), kArgument,
                "init_workspace: workspace.partials = 0x2004, wanted a multiple of 256 bytes");
  expect_status(init_workspace({}, {DeviceType::kCpu, 4}, nullptr), kArgument,
                "init_workspace: workspace.device index = 4, wanted 0 for the CPU");
}

// --- The rest ------------------------------------------------------------------------------------

TEST(BackendValidation, RefusesWithText) {
  const std::int32_t threads = cpu_num_threads();
  EXPECT_GE(threads, 1);
  expect_status(set_cpu_num_threads(0), kArgument,
                "set_cpu_num_threads: num_threads = 0, wanted 1 or more");
  EXPECT_EQ(cpu_num_threads(), threads);
  expect_status(cuda_device_info(0, nullptr), kArgument, "cuda_device_info: info = null");
}

TEST(WithoutCuda, CudaTensorsAreUnavailable) {
  if (built_with_cuda()) GTEST_SKIP() << "this build has the CUDA backend";
  EXPECT_EQ(cuda_device_count(), 0);
  EXPECT_EQ(cuda_build_version(), 0);
  const std::string rest(kNoBackend);
  expect_status(decode(valid_decode(kCuda), nullptr, {}, nullptr), StatusCode::kUnavailable,
                "decode: q" + rest);
  expect_status(init_workspace({}, kCuda, nullptr), StatusCode::kUnavailable,
                "init_workspace: workspace" + rest);
  CudaDeviceInfo info;
  expect_status(cuda_device_info(0, &info), StatusCode::kUnavailable,
                "cuda_device_info: this build has no CUDA backend; rebuild with nvcc");
}

// What only the GPU backend asks.
class CudaDecodeValidation : public testing::TestWithParam<DecodeCheck> {};

TEST_P(CudaDecodeValidation, RefusesWithText) {
  if (!built_with_cuda()) GTEST_SKIP() << "this build has no CUDA backend";
  DecodeArgs args = valid_decode(kCuda);
  GetParam().change(args);
  expect_status(decode(args, nullptr, {}, nullptr), GetParam().code, GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(
    Checks, CudaDecodeValidation,
    testing::ValuesIn(std::vector<DecodeCheck>{
        {"fp32", [](DecodeArgs& a) { a.q.dtype = a.kv_cache.dtype = a.out.dtype = DType::kFp32; },
         kUnsupported,
         "decode: q.dtype = fp32, wanted bf16 or fp16 on a GPU; fp32 runs on the CPU"},
        {"page_size",
         [](DecodeArgs& a) {
           a.kv_cache = contiguous_view(address(0x2000), DType::kBf16, kCuda, {10, 32, 2, 576});
         },
         kUnsupported,
         "decode: kv_cache.shape[1] (page_size) = 32, this build supports {64} on a GPU"},
        {"mixed_devices", [](DecodeArgs& a) { a.block_table.device = kCpu; }, kArgument,
         "decode: block_table.device = cpu, wanted cuda:0 as q"},
        {"other_gpu", [](DecodeArgs& a) { a.out.device.index = 1; }, kArgument,
         "decode: out.device = cuda:1, wanted cuda:0 as q"},
        {"q_stride", [](DecodeArgs& a) { a.q.stride[2] = 580; }, kArgument,
         "decode: q.stride[2] (h_q) = 580, wanted a multiple of 8 elements (16 bytes)"},
        {"q_base", [](DecodeArgs& a) { a.q.data = address(0x1008); }, kArgument,
         "decode: q.data = 0x1008, wanted a multiple of 16 bytes"},
        {"kv_stride", [](DecodeArgs& a) { a.kv_cache.stride[1] += 4; }, kArgument,
         "decode: kv_cache.stride[1] (page_size) = 1156, wanted a multiple of 8 elements (16 "
         "bytes)"},
        {"kv_zero_stride", [](DecodeArgs& a) { a.kv_cache.stride[0] = 0; }, kArgument,
         "decode: kv_cache.stride[0] (num_pages) = 0, wanted more than 0 and less than 2^40 "
         "bytes"},
        {"kv_long_stride", [](DecodeArgs& a) { a.kv_cache.stride[2] = std::int64_t{1} << 39; },
         kArgument,
         "decode: kv_cache.stride[2] (h_kv) = 549755813888, wanted more than 0 and less than 2^40 "
         "bytes"},
        {"kv_base", [](DecodeArgs& a) { a.kv_cache.data = address(0x2002); }, kArgument,
         "decode: kv_cache.data = 0x2002, wanted a multiple of 16 bytes"},
        {"out_stride", [](DecodeArgs& a) { a.out.stride[0] += 4; }, kArgument,
         "decode: out.stride[0] (b) = 12292, wanted a multiple of 8 elements (16 bytes)"},
        {"out_base", [](DecodeArgs& a) { a.out.data = address(0x5004); }, kArgument,
         "decode: out.data = 0x5004, wanted a multiple of 16 bytes"},
    }),
    check_name<DecodeArgs>);

TEST(CudaValidation, WithoutGpuDecodeIsUnavailable) {
  if (!built_with_cuda()) GTEST_SKIP() << "this build has no CUDA backend";
  if (cuda_device_count() > 0) GTEST_SKIP() << "there is a GPU";
  const Status status = decode(valid_decode(kCuda), nullptr, {}, nullptr);
  EXPECT_EQ(status.code(), StatusCode::kUnavailable) << status.message();
}

}  // namespace
}  // namespace flash_mla::test
