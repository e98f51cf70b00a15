// Decode on the CPU against the reference, and what a decode promises besides: reruns equal bit for
// bit, a request's result depends on nothing else in the batch, bad contents are refused with
// nothing written.
#include "flash_mla/decode.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "decode_problem.h"
#include "flash_mla/backend.h"

namespace flash_mla::test {
namespace {

const Workspace kNoWorkspace;

std::string case_name(const testing::TestParamInfo<DecodeCase>& info) { return info.param.name; }

bool same_bytes(TestTensor& x, TestTensor& y) {
  return x.storage().size() == y.storage().size() &&
         std::memcmp(x.storage().data(), y.storage().data(), x.storage().size()) == 0;
}

class CpuDecode : public testing::TestWithParam<DecodeCase> {};

TEST_P(CpuDecode, MatchesReference) {
  DecodeProblem problem(GetParam());
  const Status status = decode(problem.args(), nullptr, kNoWorkspace, nullptr);
  ASSERT_TRUE(status.ok()) << status.message();
  problem.check_result();
}

INSTANTIATE_TEST_SUITE_P(Cases, CpuDecode, testing::ValuesIn(decode_cases()), case_name);

const DecodeCase kUneven = {.name = "uneven",
                            .s_q = 2,
                            .h_q = 12,
                            .page_size = 16,
                            .lengths = {3000, 1, 64, 0, 700},
                            .causal = true};

TEST(CpuDecodePromises, RerunsAreEqualBitForBit) {
  DecodeProblem first(kUneven), second(kUneven);
  ASSERT_TRUE(decode(first.args(), nullptr, kNoWorkspace, nullptr).ok());
  for (int run = 0; run < 5; ++run) {
    second.clear_outputs();
    ASSERT_TRUE(decode(second.args(), nullptr, kNoWorkspace, nullptr).ok());
    ASSERT_TRUE(same_bytes(first.out, second.out));
    ASSERT_TRUE(same_bytes(first.lse, second.lse));
  }
}

TEST(CpuDecodePromises, BatchInvariant) {
  DecodeProblem together(kUneven);
  DecodeArgs args = together.args();
  args.batch_invariant = true;
  ASSERT_TRUE(decode(args, nullptr, kNoWorkspace, nullptr).ok());
  const std::vector<double> out = together.out.values();
  const std::size_t size = out.size() / kUneven.lengths.size();

  for (std::size_t request = 0; request < kUneven.lengths.size(); ++request) {
    together.clear_outputs();
    DecodeArgs alone = together.args();
    alone.batch_invariant = true;
    for (TensorView* view :
         {&alone.q, &alone.block_table, &alone.cache_seqlens, &alone.out, &alone.lse}) {
      view->data =
          static_cast<std::byte*>(view->data) + request * view->stride[0] * dtype_size(view->dtype);
      view->shape[0] = 1;
    }
    ASSERT_TRUE(decode(alone, nullptr, kNoWorkspace, nullptr).ok());
    const std::vector<double> got = read_values(alone.out);
    EXPECT_TRUE(std::equal(got.begin(), got.end(), out.begin() + request * size)) << request;
  }
}

TEST(CpuDecodePromises, ThreadCountDoesNotChangeTheResult) {
  const std::int32_t threads = cpu_num_threads();
  DecodeProblem one(kUneven), many(kUneven);
  ASSERT_TRUE(set_cpu_num_threads(1).ok());
  ASSERT_TRUE(decode(one.args(), nullptr, kNoWorkspace, nullptr).ok());
  ASSERT_TRUE(set_cpu_num_threads(7).ok());
  ASSERT_TRUE(decode(many.args(), nullptr, kNoWorkspace, nullptr).ok());
  ASSERT_TRUE(set_cpu_num_threads(threads).ok());
  EXPECT_TRUE(same_bytes(one.out, many.out));
  EXPECT_TRUE(same_bytes(one.lse, many.lse));
}

TEST(CpuDecodePromises, NanInsideGivesNan) {
  for (const int h_q : {2, 20}) {
    for (const int token : {0, 70, 99}) {
      DecodeProblem problem({.name = "nan", .h_q = h_q, .lengths = {100}});
      const std::int64_t row = std::int64_t{problem.reference.table[token / 64]} * 64 + token % 64;
      problem.kv_cache.set(row * kHeadDimQk + kHeadDimV, NAN);
      ASSERT_TRUE(decode(problem.args(), nullptr, kNoWorkspace, nullptr).ok());
      const auto is_nan = [](double x) { return std::isnan(x); };
      const std::vector<double> out = problem.out.values(), lse = problem.lse.values();
      EXPECT_TRUE(std::all_of(out.begin(), out.end(), is_nan)) << h_q << " heads, token " << token;
      EXPECT_TRUE(std::all_of(lse.begin(), lse.end(), is_nan)) << h_q << " heads, token " << token;
    }
  }
}

TEST(CpuDecodePromises, ZeroExtentsWriteNothing) {
  DecodeProblem problem(kUneven);
  for (const int axis : {0, 1, 2}) {
    DecodeArgs args = problem.args();
    args.q.shape[axis] = args.out.shape[axis] = 0;
    args.lse.shape[axis == 0 ? 0 : 3 - axis] = 0;
    if (axis == 0) args.block_table.shape[0] = args.cache_seqlens.shape[0] = 0;
    const Status status = decode(args, nullptr, kNoWorkspace, nullptr);
    EXPECT_TRUE(status.ok()) << status.message();
  }
  EXPECT_TRUE(problem.out.never_written());
  EXPECT_TRUE(problem.lse.never_written());
}

TEST(CpuDecodePromises, NoPagesAtAll) {
  DecodeProblem problem({.name = "none", .h_q = 2, .lengths = {0, 0}});
  DecodeArgs args = problem.args();
  args.kv_cache.shape[0] = 0;
  args.kv_cache.data = nullptr;
  args.block_table.shape[1] = 0;
  args.block_table.data = nullptr;
  const Status status = decode(args, nullptr, kNoWorkspace, nullptr);
  ASSERT_TRUE(status.ok()) << status.message();
  problem.check_result();
}

// What only the data says: refused with nothing written.
TEST(CpuDecodeContents, PageNumberOutOfRange) {
  for (const std::int32_t page : {-1, 4 + 2, 2147480000}) {
    DecodeProblem problem({.name = "pages", .h_q = 2, .lengths = {100, 128}});
    problem.block_table.set(problem.reference.max_pages + 1, page);
    const Status status = decode(problem.args(), nullptr, kNoWorkspace, nullptr);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(std::string(status.message()), "decode: block_table[1, 1] = " + std::to_string(page) +
                                                 ", wanted 0 .. num_pages - 1 = 5");
    EXPECT_TRUE(problem.out.never_written());
    EXPECT_TRUE(problem.lse.never_written());
  }
}

TEST(CpuDecodeContents, LengthOutOfRange) {
  for (const std::int32_t length : {-1, 5 * 64 + 1, 2147483647}) {
    DecodeProblem problem({.name = "lengths", .h_q = 2, .lengths = {100, 128}});
    problem.cache_seqlens.set(1, length);
    const Status status = decode(problem.args(), nullptr, kNoWorkspace, nullptr);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(std::string(status.message()),
              "decode: cache_seqlens[1] = " + std::to_string(length) +
                  ", wanted 0 .. 320 (max_pages * page_size)");
    EXPECT_TRUE(problem.out.never_written());
    EXPECT_TRUE(problem.lse.never_written());
  }
}

TEST(CpuPlan, OnePartAndNoSplits) {
  DecodeProblem problem(kUneven);
  DecodeArgs args = problem.args();
  args.out = args.lse = {};
  std::int32_t parts = 0;
  std::size_t counters = 1, partials = 1;
  ASSERT_TRUE(plan_size(args, &parts).ok());
  EXPECT_EQ(parts, 1);
  ASSERT_TRUE(workspace_size(args, &counters, &partials).ok());
  EXPECT_EQ(counters, 0u);
  EXPECT_EQ(partials, 0u);
  EXPECT_TRUE(init_workspace(kNoWorkspace, {}, nullptr).ok());

  TestTensor metadata(DType::kInt32, {1, kPlanRowInts});
  TestTensor num_splits(DType::kInt32, {static_cast<std::int64_t>(kUneven.lengths.size()) + 1});
  const DecodePlan plan = {metadata.view(), num_splits.view()};
  const Status status = plan_decode(args, plan, nullptr);
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(num_splits.values(), (std::vector<double>{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(metadata.values()[0], 0);
  EXPECT_EQ(metadata.values()[2], 4);
  EXPECT_TRUE(metadata.guards_intact() && num_splits.guards_intact());

  ASSERT_TRUE(decode(problem.args(), &plan, kNoWorkspace, nullptr).ok());
  problem.check_result();
}

TEST(CpuIsa, IsTheOneAskedFor) {
  const char* asked = std::getenv("FLASH_MLA_CPU_ISA");
  if (asked != nullptr && std::string(asked) != cpu_isa()) {
    GTEST_SKIP() << "this machine does not run " << asked;
  }
}

TEST(CpuDescribe, NamesTheBackend) {
  DecodeProblem problem(kUneven);
  DecodeArgs args = problem.args();
  for (TensorView* view :
       {&args.q, &args.kv_cache, &args.block_table, &args.cache_seqlens, &args.out, &args.lse}) {
    view->data = nullptr;  // not looked at
  }
  EXPECT_TRUE(is_supported(args).ok());
  char text[64];
  ASSERT_TRUE(describe_decode(args, text, sizeof(text)).ok());
  EXPECT_EQ(std::string(text), "cpu decode_dense bf16 isa=" + std::string(cpu_isa()) +
                                   " threads=" + std::to_string(cpu_num_threads()));
  ASSERT_TRUE(describe_decode(args, text, 4).ok());
  EXPECT_STREQ(text, "cpu");
}

}  // namespace
}  // namespace flash_mla::test
