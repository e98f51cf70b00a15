// The GPU backend's caches, merges and checks of contents, and what compute-sanitizer runs:
// GpuSanitized all its tools, GpuMemcheck one. Every test skips, and says why, where there is no
// Hopper GPU.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "cache_problem.h"
#include "decode_problem.h"
#include "gpu_place.h"
#include "gpu_run.h"

namespace flash_mla::test {
namespace {

void check_validate() {
  GpuRun run(kUneven);
  run.args.validate = true;
  ASSERT_OK(run.run());
  run.check_result();

  const DecodeCase small = {.name = "small", .h_q = 2, .lengths = {100, 128}};
  for (const std::int32_t length : {-1, 5 * 64 + 1}) {
    GpuRun bad(small);
    bad.args.validate = true;
    bad.problem.cache_seqlens.set(1, length);
    bad.place.put(bad.problem.cache_seqlens);
    const Status status = bad.run();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(std::string(status.message()),
              "decode: cache_seqlens[1] = " + std::to_string(length) +
                  ", wanted 0 .. 320 (max_pages * page_size)");
    bad.finish();
    EXPECT_TRUE(bad.problem.out.never_written() && bad.problem.lse.never_written());
  }
  GpuRun bad(small);
  bad.args.validate = true;
  bad.problem.block_table.set(bad.problem.reference.max_pages + 1, 2147480000);
  bad.place.put(bad.problem.block_table);
  const Status status = bad.run();
  EXPECT_EQ(std::string(status.message()),
            "decode: block_table[1, 1] = 2147480000, wanted 0 .. num_pages - 1 = 5");
  bad.finish();
  EXPECT_TRUE(bad.problem.out.never_written() && bad.problem.lse.never_written());
}

TEST(GpuValidate, FindsBadContents) {
  SKIP_WITHOUT_GPU();
  check_validate();
}

TEST(GpuValidate, RefusedUnderCapture) {
  SKIP_WITHOUT_GPU();
  GpuRun run(kUneven);
  run.args.validate = true;
  Status refused;
  Graph graph(run.stream, [&] { refused = run.run(); });
  EXPECT_EQ(refused.code(), StatusCode::kInvalidArgument) << refused.message();
  run.args.validate = false;
  ASSERT_OK(run.run());
  run.check_result();
}

template <typename Cases, typename Check>
void check_on_gpu(const Cases& cases, Check check) {
  Stream stream;
  check_each<GpuPlace>(cases, check, stream.get(), [&] { stream.synchronize(); });
}

TEST(GpuCache, AppendMatchesReference) {
  SKIP_WITHOUT_GPU();
  check_on_gpu(append_cases(), check_append);
}

TEST(GpuCache, AppendSkipsSlotsPastTheCache) {
  SKIP_WITHOUT_GPU();
  GpuPlace place;
  Stream stream;
  TestTensor kv_c(DType::kBf16, {2, 512}), k_pe(DType::kBf16, {2, 64});
  TestTensor kv_cache(DType::kBf16, {2, 64, 576}), slots(DType::kInt64, {2});
  slots.set_all({128, 1e15});
  ASSERT_OK(append_kv({place.put(kv_c), place.put(k_pe), place.put(kv_cache), place.put(slots)},
                      stream.get()));
  stream.synchronize();
  place.take_back(kv_cache);
  EXPECT_TRUE(kv_cache.never_written());
}

TEST(GpuCache, MergeMatchesReference) {
  SKIP_WITHOUT_GPU();
  check_on_gpu(merge_cases(), check_merge);
}

class GpuSanitized : public testing::TestWithParam<DecodeCase> {};

TEST_P(GpuSanitized, Decode) {
  SKIP_WITHOUT_GPU();
  GpuRun run(GetParam());
  GpuPlan plan(run, plan_rows(run.args));
  ASSERT_OK(plan_decode(run.args, plan.plan, run.stream.get()));
  for (int i = 0; i < 2; ++i) {  // the second call finds what the first one has kept
    run.clear_outputs();
    ASSERT_OK(run.run(&plan.plan));
    run.check_result();
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, GpuSanitized,
    testing::Values(
        DecodeCase{.name = "split", .h_q = 16, .lengths = {1500, 1, 0, 70}},
        DecodeCase{.name = "pair", .s_q = 2, .h_q = 65, .lengths = {400, 130}, .causal = true},
        DecodeCase{.name = "fp16_strided",
                   .dtype = DType::kFp16,
                   .h_q = 6,
                   .h_kv = 2,
                   .lengths = {300, 64},
                   .strided = true},
        DecodeCase{.name = "teams", .s_q = 17, .h_q = 12, .lengths = {500, 16}, .causal = true},
        DecodeCase{.name = "many", .h_q = 2, .lengths = std::vector<std::int32_t>(130, 70)}),
    case_name);

// Parts so long that their pages come to L2 ahead: each request's page again and again, which
// leaves the output as it is and adds the logarithm of their number to lse. Too long for the
// sanitizers that follow every access to shared memory.
TEST(GpuMemcheck, LongPartsOfRepeatedPages) {
  SKIP_WITHOUT_GPU();
  constexpr std::int64_t kRequests = 66, kRepeats = 130;
  const std::vector<std::int32_t> one_page(kRequests, 64);
  GpuRun run({.name = "repeated", .h_q = 128, .lengths = one_page, .deviation = 0.1});
  const std::vector<double> pages = run.problem.block_table.values();
  const std::int64_t columns = run.args.block_table.shape[1];
  std::vector<double> repeated;
  for (std::int64_t i = 0; i < kRequests; ++i) {
    repeated.insert(repeated.end(), kRepeats, pages[i * columns]);
  }
  TestTensor table(DType::kInt32, {kRequests, kRepeats}), lengths(DType::kInt32, {kRequests});
  table.set_all(repeated);
  lengths.set_all(std::vector<double>(kRequests, kRepeats * 64));
  run.args.block_table = run.place.put(table);
  run.args.cache_seqlens = run.place.put(lengths);
  ASSERT_OK(run.run());
  run.finish();
  std::vector<double> lse = run.problem.lse.values();
  for (double& x : lse) x -= std::log(static_cast<double>(kRepeats));
  run.problem.lse.set_all(lse);
  run.problem.check_result();
}

TEST(GpuSanitizedCache, AppendMergeValidate) {
  SKIP_WITHOUT_GPU();
  const std::vector<AppendCase> appends = append_cases();
  const std::vector<MergeCase> merges = merge_cases();
  check_on_gpu(std::vector{appends[1], appends[2]}, check_append);
  check_on_gpu(std::vector{merges[1], merges[2]}, check_merge);
  check_validate();
}

}  // namespace
}  // namespace flash_mla::test
