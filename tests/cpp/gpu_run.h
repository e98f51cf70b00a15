// What the GPU tests share: a problem on the GPU with its workspace, stream and plan, and the words
// with which a test skips.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "decode_problem.h"
#include "gpu_place.h"

namespace flash_mla::test {

#define SKIP_WITHOUT_GPU()                                                   \
  if (const std::string why = why_no_gpu(); !why.empty()) {                  \
    GTEST_SKIP() << "SKIPPED, NOT TESTED: no Hopper GPU to run on: " << why; \
  }

#define ASSERT_OK(expression)                       \
  do {                                              \
    const Status status_ = (expression);            \
    ASSERT_TRUE(status_.ok()) << status_.message(); \
  } while (false)

inline std::string case_name(const testing::TestParamInfo<DecodeCase>& info) {
  return info.param.name;
}

inline const DecodeCase kUneven = {
    .name = "uneven", .s_q = 2, .h_q = 12, .lengths = {3000, 1, 64, 0, 700}, .causal = true};

// A problem on the GPU with its workspace and stream.
struct GpuRun {
  explicit GpuRun(const DecodeCase& decode_case, std::uint32_t seed = 1)
      : problem(decode_case, seed), args(problem.args(std::move(place))), workspace(args) {}

  [[nodiscard]] Status run(const DecodePlan* plan = nullptr) {
    return decode(args, plan, workspace.get(), stream.get());
  }
  // Brings the results here.
  void finish() {
    stream.synchronize();
    place.take_back(problem.out);
    place.take_back(problem.lse);
  }
  void check_result() {
    finish();
    problem.check_result();
    EXPECT_TRUE(workspace.intact()) << "counters changed, or written outside the workspace";
  }
  // Result bytes, out then lse.
  [[nodiscard]] std::vector<std::byte> result() {
    finish();
    std::vector<std::byte> bytes(problem.out.storage().begin(), problem.out.storage().end());
    bytes.insert(bytes.end(), problem.lse.storage().begin(), problem.lse.storage().end());
    return bytes;
  }
  void clear_outputs() {
    problem.clear_outputs();
    place.put(problem.out);
    place.put(problem.lse);
  }

  GpuPlace place;
  DecodeProblem problem;
  DecodeArgs args;
  GpuWorkspace workspace;
  Stream stream;
};

// A plan's tensors on the GPU.
struct GpuPlan {
  GpuPlan(GpuRun& run, std::int64_t rows)
      : metadata(DType::kInt32, {rows, kPlanRowInts}),
        num_splits(DType::kInt32, {run.args.q.shape[0] + 1}),
        plan{run.place.put(metadata), run.place.put(num_splits)} {}

  TestTensor metadata, num_splits;
  DecodePlan plan;
};

inline std::int32_t plan_rows(const DecodeArgs& args) {
  std::int32_t rows = 0;
  const Status status = plan_size(args, &rows);
  EXPECT_TRUE(status.ok()) << status.message();
  return rows;
}

}  // namespace flash_mla::test
