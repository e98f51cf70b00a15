// append_kv and merge_states on the CPU.
#include <gtest/gtest.h>

#include "cache_problem.h"

namespace flash_mla::test {
namespace {

void no_wait() {}

TEST(CpuAppend, MatchesReference) {
  std::vector<AppendCase> cases = append_cases();
  cases.push_back({DType::kFp32, 64, 3, true, true, {100, 3, -1, 65}});
  check_each<HostPlace>(cases, check_append, nullptr, no_wait);
}

TEST(CpuAppend, LaterOfTwoEqualSlotsStays) {
  TestTensor kv_c(DType::kBf16, {2, 512}), k_pe(DType::kBf16, {2, 64});
  TestTensor kv_cache(DType::kBf16, {1, 16, 576}), slots(DType::kInt64, {2});
  kv_c.set_all(std::vector<double>(1024, 1.0));
  k_pe.set_all(std::vector<double>(128, 1.0));
  kv_c.set(512, 2.0);
  k_pe.set(64, 2.0);
  slots.set_all({3, 3});
  ASSERT_TRUE(append_kv({kv_c.view(), k_pe.view(), kv_cache.view(), slots.view()}, nullptr).ok());
  EXPECT_EQ(kv_cache.values()[3 * 576], 2.0);
  EXPECT_EQ(kv_cache.values()[3 * 576 + 512], 2.0);
}

TEST(CpuAppend, SlotPastTheCacheWritesNothing) {
  TestTensor kv_c(DType::kBf16, {2, 512}), k_pe(DType::kBf16, {2, 64});
  TestTensor kv_cache(DType::kBf16, {2, 16, 576}), slots(DType::kInt64, {2});
  for (const std::int64_t slot : {std::int64_t{32}, std::int64_t{1} << 40}) {
    slots.set_all({0, static_cast<double>(slot)});
    const Status status =
        append_kv({kv_c.view(), k_pe.view(), kv_cache.view(), slots.view()}, nullptr);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(std::string(status.message()).find("append_kv: slot_mapping[1] = "),
              std::string::npos)
        << status.message();
    EXPECT_TRUE(kv_cache.never_written());
  }
}

TEST(CpuMerge, MatchesReference) {
  check_each<HostPlace>(merge_cases(), check_merge, nullptr, no_wait);
}

}  // namespace
}  // namespace flash_mla::test
