// The GPU backend's decodes against the reference and the CPU backend, and what it promises
// besides. Every test skips, and says why, where there is no Hopper GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "cuda/sm90/decode_dense/sizes.h"
#include "decode_problem.h"
#include "flash_mla/backend.h"
#include "gpu_place.h"
#include "gpu_run.h"

namespace flash_mla::test {
namespace {

const DecodeCase kUnevenTurned = {
    .name = "uneven_turned", .s_q = 2, .h_q = 12, .lengths = {64, 3000, 700, 1, 0}, .causal = true};

class GpuDecode : public testing::TestWithParam<DecodeCase> {};

TEST_P(GpuDecode, MatchesReference) {
  SKIP_WITHOUT_GPU();
  GpuRun run(GetParam());
  ASSERT_OK(run.run());
  run.check_result();
}

INSTANTIATE_TEST_SUITE_P(Cases, GpuDecode, testing::ValuesIn(gpu_decode_cases()), case_name);

TEST(GpuDecodeRandom, MatchesReference) {
  SKIP_WITHOUT_GPU();
  std::mt19937 random(11);
  const auto draw = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  for (int i = 0; i < 40; ++i) {
    DecodeCase decode_case;
    decode_case.dtype = draw(0, 1) != 0 ? DType::kBf16 : DType::kFp16;
    decode_case.s_q = draw(0, 3) != 0 ? draw(1, 4) : draw(5, 40);
    decode_case.h_kv = draw(0, 2) != 0 ? 1 : draw(1, 4);
    decode_case.h_q = decode_case.h_kv * draw(1, 130 / decode_case.h_kv / decode_case.s_q + 1);
    decode_case.lengths.resize(draw(1, 12));
    for (std::int32_t& length : decode_case.lengths) length = draw(0, draw(1, 600));
    decode_case.causal = draw(0, 1) != 0;
    decode_case.strided = draw(0, 1) != 0;
    decode_case.empty_lse =
        draw(0, 1) != 0 ? EmptyLse::kPositiveInfinity : EmptyLse::kNegativeInfinity;
    SCOPED_TRACE(testing::Message()
                 << "draw " << i << ": s_q " << decode_case.s_q << ", h_q " << decode_case.h_q
                 << ", h_kv " << decode_case.h_kv << ", causal " << decode_case.causal);
    GpuRun run(decode_case, i);
    ASSERT_OK(run.run());
    run.check_result();
  }
}

// Too large for the naive reference: against the CPU backend, at the tolerance that callers of this
// API test with.
class GpuDecodeLarge : public testing::TestWithParam<DecodeCase> {};

std::vector<DecodeCase> large_cases() {
  std::vector<std::int32_t> mixed, short_ones;
  std::mt19937 random(2);
  for (int i = 0; i < 64; ++i) {
    mixed.push_back(std::uniform_int_distribution<int>(0, 3000)(random));
  }
  for (int i = 0; i < 1200; ++i) short_ones.push_back(i % 65);
  std::vector<DecodeCase> cases = {
      {.name = "heads_128", .h_q = 128, .lengths = mixed},
      {.name = "heads_128_sq2_causal", .s_q = 2, .h_q = 128, .lengths = mixed, .causal = true},
      {.name = "heads_16_fp16", .dtype = DType::kFp16, .h_q = 16, .lengths = mixed},
      {.name = "one_long", .h_q = 128, .lengths = {32768}},
      {.name = "sq128", .s_q = 128, .h_q = 16, .lengths = {2000, 300}, .causal = true},
      {.name = "many_short", .h_q = 16, .lengths = short_ones}};
  // As those callers draw them.
  for (DecodeCase& decode_case : cases) decode_case.deviation = 0.1;
  return cases;
}

TEST_P(GpuDecodeLarge, AgreesWithCpu) {
  SKIP_WITHOUT_GPU();
  GpuRun run(GetParam());
  ASSERT_OK(run.run());
  run.finish();
  EXPECT_TRUE(run.workspace.intact());
  EXPECT_TRUE(run.problem.out.guards_intact() && run.problem.lse.guards_intact());
  const std::vector<double> out = run.problem.out.values(), lse = run.problem.lse.values();
  run.problem.clear_outputs();
  ASSERT_OK(decode(run.problem.args(), nullptr, {}, nullptr));
  const std::vector<double> cpu_out = run.problem.out.values();
  const std::vector<double> cpu_lse = run.problem.lse.values();
  std::size_t bad_out = 0, bad_lse = 0;
  double product = 0.0, square = 0.0, cpu_square = 0.0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    bad_out += !(std::abs(out[i] - cpu_out[i]) <= 8e-4 + 0.016 * std::abs(cpu_out[i]));
    product += out[i] * cpu_out[i];
    square += out[i] * out[i];
    cpu_square += cpu_out[i] * cpu_out[i];
  }
  for (std::size_t i = 0; i < lse.size(); ++i) {
    bad_lse += lse[i] != cpu_lse[i] &&
               !(std::abs(lse[i] - cpu_lse[i]) <= 1e-6 + 1.2e-4 * std::abs(cpu_lse[i]));
  }
  EXPECT_EQ(bad_out, 0u) << "of " << out.size();
  EXPECT_EQ(bad_lse, 0u) << "of " << lse.size();
  EXPECT_LE(1.0 - 2.0 * product / (square + cpu_square), 5e-6);
}

INSTANTIATE_TEST_SUITE_P(Cases, GpuDecodeLarge, testing::ValuesIn(large_cases()), case_name);

TEST(GpuPromises, RerunsAreEqualBitForBit) {
  SKIP_WITHOUT_GPU();
  GpuRun run(kUneven);
  ASSERT_OK(run.run());
  const std::vector<std::byte> first = run.result();
  for (int i = 0; i < 20; ++i) {
    run.clear_outputs();
    ASSERT_OK(run.run());
    ASSERT_TRUE(run.result() == first) << "rerun " << i;
  }
}

TEST(GpuPromises, BatchInvariant) {
  SKIP_WITHOUT_GPU();
  GpuRun run(kUneven);
  run.args.batch_invariant = true;
  ASSERT_OK(run.run());
  run.check_result();
  const std::vector<double> together = run.problem.out.values();
  const std::vector<std::byte> bytes = run.result();
  const std::size_t size = together.size() / kUneven.lengths.size();

  // A plan of one row means the same.
  GpuPlan one_row(run, 1);
  run.args.batch_invariant = false;
  run.clear_outputs();
  ASSERT_OK(run.run(&one_row.plan));
  EXPECT_TRUE(run.result() == bytes);

  run.args.batch_invariant = true;
  for (std::size_t request = 0; request < kUneven.lengths.size(); ++request) {
    run.clear_outputs();
    DecodeArgs alone = run.args;
    for (TensorView* view :
         {&alone.q, &alone.block_table, &alone.cache_seqlens, &alone.out, &alone.lse}) {
      view->data =
          static_cast<std::byte*>(view->data) + request * view->stride[0] * dtype_size(view->dtype);
      view->shape[0] = 1;
    }
    ASSERT_OK(decode(alone, nullptr, run.workspace.get(), run.stream.get()));
    run.finish();
    const std::vector<double> out = run.problem.out.values();
    EXPECT_TRUE(
        std::memcmp(&out[request * size], &together[request * size], size * sizeof(double)) == 0)
        << "request " << request;
  }
}

TEST(GpuPromises, NanInsideGivesNan) {
  SKIP_WITHOUT_GPU();
  const auto is_nan = [](double x) { return std::isnan(x); };
  for (const int length : {60, 100, 1000}) {  // one piece, few, many
    for (const int h_q : {2, 100}) {          // single CTAs, pairs
      SCOPED_TRACE(testing::Message() << length << " tokens, " << h_q << " heads");
      GpuRun run({.name = "nan", .h_q = h_q, .lengths = {length}});
      const int token = length - 3;
      const std::int64_t row =
          std::int64_t{run.problem.reference.table[token / 64]} * 64 + token % 64;
      run.problem.kv_cache.set(row * kHeadDimQk + kHeadDimV, NAN);
      run.place.put(run.problem.kv_cache);
      ASSERT_OK(run.run());
      run.finish();
      const std::vector<double> out = run.problem.out.values(), lse = run.problem.lse.values();
      EXPECT_TRUE(std::all_of(out.begin(), out.end(), is_nan));
      EXPECT_TRUE(std::all_of(lse.begin(), lse.end(), is_nan));
    }
  }
}

TEST(GpuPromises, PlanCoversTheBatch) {
  SKIP_WITHOUT_GPU();
  GpuRun run(kUneven);
  GpuPlan plan(run, plan_rows(run.args));
  ASSERT_OK(plan_decode(run.args, plan.plan, run.stream.get()));
  run.stream.synchronize();
  run.place.take_back(plan.metadata);
  run.place.take_back(plan.num_splits);
  EXPECT_TRUE(plan.metadata.guards_intact() && plan.num_splits.guards_intact());
  const std::vector<double> splits = plan.num_splits.values(), rows = plan.metadata.values();
  EXPECT_EQ(splits.front(), 0.0);
  for (std::size_t i = 1; i < splits.size(); ++i) EXPECT_GE(splits[i], splits[i - 1] + 1);
  EXPECT_EQ(rows[0], 0.0);
  EXPECT_EQ(rows[1], 0.0);
  ASSERT_OK(run.run(&plan.plan));
  run.check_result();
}

TEST(GpuPromises, PlanContentsAreNeverTrusted) {
  SKIP_WITHOUT_GPU();
  GpuRun run(kUneven);
  GpuPlan plan(run, plan_rows(run.args));
  for (const double garbage : {0.0, -1.0, 2147480000.0, 77.0}) {
    plan.metadata.set_all(std::vector<double>(plan.metadata.num_elements(), garbage));
    plan.num_splits.set_all(std::vector<double>(plan.num_splits.num_elements(), garbage));
    run.place.put(plan.metadata);
    run.place.put(plan.num_splits);
    run.clear_outputs();
    ASSERT_OK(run.run(&plan.plan));
    run.check_result();
  }
}

TEST(GpuPromises, GraphReplaysWithOtherLengths) {
  SKIP_WITHOUT_GPU();
  GpuRun run(kUneven);
  GpuPlan plan(run, plan_rows(run.args));
  Status planned, decoded;
  Graph graph(run.stream, [&] {
    planned = plan_decode(run.args, plan.plan, run.stream.get());
    decoded = run.run(&plan.plan);
  });
  ASSERT_OK(planned);
  ASSERT_OK(decoded);
  for (int i = 0; i < 3; ++i) {
    graph.replay(run.stream);
    run.check_result();

    DecodeProblem other(kUnevenTurned, 100 + i);
    run.stream.synchronize();
    const std::vector<TestTensor*> here = run.problem.tensors(), there = other.tensors();
    for (std::size_t tensor = 0; tensor < here.size(); ++tensor) {
      run.place.put_as(*here[tensor], *there[tensor]);
    }
    graph.replay(run.stream);
    run.finish();
    std::swap(run.problem.out, other.out);
    std::swap(run.problem.lse, other.lse);
    other.check_result();
    EXPECT_TRUE(run.workspace.intact());

    run.problem.clear_outputs();
    for (TestTensor* tensor : here) run.place.put(*tensor);
  }
}

TEST(GpuPromises, TwoStreamsAtOnce) {
  SKIP_WITHOUT_GPU();
  GpuRun one(kUneven, 1), two(kUnevenTurned, 2);
  for (int i = 0; i < 20; ++i) {
    ASSERT_OK(one.run());
    ASSERT_OK(two.run());
  }
  one.check_result();
  two.check_result();
}

TEST(GpuPromises, OneWorkspaceServesManyShapes) {
  SKIP_WITHOUT_GPU();
  GpuRun large({.name = "large", .s_q = 2, .h_q = 128, .lengths = kUneven.lengths});
  DecodeCase one_token = kUneven, few_heads = kUneven;  // of the same lengths
  one_token.s_q = 1;
  few_heads.h_q = 3;
  for (int round = 0; round < 2; ++round) {
    for (const DecodeCase& decode_case : {kUneven, kUnevenTurned, one_token, few_heads}) {
      GpuRun small(decode_case);
      for (const bool batch_invariant : {false, true}) {
        small.args.batch_invariant = batch_invariant;
        small.clear_outputs();
        ASSERT_OK(decode(small.args, nullptr, large.workspace.get(), small.stream.get()));
        small.check_result();
      }
    }
    large.clear_outputs();
    ASSERT_OK(large.run());
    large.check_result();
  }
}

// Behind the partial results each CTA keeps its first work item, with the lengths that it follows
// from (memo.cuh). The tests that follow know the layout: lengths, 30 words, 2 sums. That what is
// kept serves at all shows in the time alone.
constexpr std::size_t kMemo = cuda::decode_dense::kMemoBytes;
constexpr std::size_t kMemoLengths = cuda::decode_dense::kMemoRequests * sizeof(std::int32_t);

std::vector<std::int32_t> uneven_lengths(int count) {
  std::vector<std::int32_t> lengths(count);
  for (int i = 0; i < count; ++i) lengths[i] = 1 + i * 37 % 150;
  return lengths;
}

TEST(GpuPromises, WhatLiesInPartialsDoesNotMatter) {
  SKIP_WITHOUT_GPU();
  const DecodeCase many = {.name = "many", .h_q = 2, .lengths = uneven_lengths(200)};
  const DecodeCase pairs = {.name = "pairs", .h_q = 72, .lengths = uneven_lengths(40)};
  for (const DecodeCase& decode_case : {kUneven, many, pairs}) {
    SCOPED_TRACE(decode_case.name);
    GpuRun run(decode_case);
    ASSERT_OK(run.run());
    run.check_result();
    const std::vector<std::byte> first = run.result(), kept = run.workspace.partials();
    const auto check = [&](const std::vector<std::byte>& partials, const char* what, int which) {
      run.workspace.set_partials(partials);
      run.clear_outputs();
      ASSERT_OK(run.run());
      ASSERT_TRUE(run.result() == first) << what << " " << which;
    };
    // A bit in one word of every CTA's.
    std::vector<std::size_t> words = {0, 4, 12, 16, kMemoLengths - 4};
    for (std::size_t at = kMemoLengths; at < kMemo; at += 4) words.push_back(at);
    for (const std::size_t at : words) {
      std::vector<std::byte> changed = kept;
      const std::size_t memos = std::min<std::size_t>(changed.size() / kMemo, 132);
      for (std::size_t i = 1; i <= memos; ++i) {
        changed[changed.size() - i * kMemo + at] ^= std::byte{1} << at / 4 % 8;
      }
      check(changed, "word at", static_cast<int>(at));
    }
    // Another CTA's.
    std::vector<std::byte> moved = kept;
    std::rotate(moved.begin(), moved.begin() + kMemo, moved.end());
    check(moved, "moved by", kMemo);
    for (const int fill : {0, 1, 0xFF}) {
      check(std::vector<std::byte>(kept.size(), static_cast<std::byte>(fill)), "filled with", fill);
    }
    check(kept, "as it was", 0);
  }
}

TEST(GpuPromises, LengthsThatComeBack) {
  SKIP_WITHOUT_GPU();
  GpuRun run(kUneven);
  DecodeProblem other(kUnevenTurned, 100);
  const std::vector<TestTensor*> here = run.problem.tensors(), there = other.tensors();
  std::vector<std::byte> first[2], partials[2];
  for (int i = 0; i < 12; ++i) {
    const int which = i / 2 % 2;  // each lengths twice in a row
    for (std::size_t tensor = 0; tensor < here.size(); ++tensor) {
      run.place.put_as(*here[tensor], which == 0 ? *here[tensor] : *there[tensor]);
    }
    if (i >= 6) {  // with what was kept of the other lengths
      std::vector<std::byte> wrong = partials[1 - which];
      if (i >= 8) {  // and with these lengths beside it
        for (std::size_t end = wrong.size(); end > wrong.size() - 132 * kMemo; end -= kMemo) {
          std::copy_n(partials[which].begin() + static_cast<std::ptrdiff_t>(end - kMemo),
                      kMemoLengths, wrong.begin() + static_cast<std::ptrdiff_t>(end - kMemo));
        }
      }
      run.workspace.set_partials(wrong);
    }
    ASSERT_OK(run.run());
    const std::vector<std::byte> result = run.result();
    if (first[which].empty()) first[which] = result;
    EXPECT_TRUE(result == first[which]) << "call " << i;
    if (i < 6) partials[which] = run.workspace.partials();
    run.problem.clear_outputs();
  }
  EXPECT_FALSE(first[0] == first[1]);
  EXPECT_TRUE(run.workspace.intact());
}

TEST(GpuPromises, RefusedCallsLeaveNothingBehind) {
  SKIP_WITHOUT_GPU();
  GpuRun run(kUneven);
  DecodeArgs bad = run.args;
  bad.q.shape[3] = 512;
  EXPECT_FALSE(decode(bad, nullptr, run.workspace.get(), run.stream.get()).ok());
  Workspace small = run.workspace.get();
  if (small.partials_size > 0) {
    --small.partials_size;
    EXPECT_EQ(decode(run.args, nullptr, small, run.stream.get()).code(),
              StatusCode::kInvalidArgument);
  }
  GpuPlan long_plan(run, 10000);
  EXPECT_EQ(run.run(&long_plan.plan).code(), StatusCode::kInvalidArgument);
  ASSERT_OK(run.run());
  run.check_result();
}

}  // namespace
}  // namespace flash_mla::test
