// Random arguments through the C API, on the CPU: every call either gives the right answer or an
// error with nothing written. The draws come from a fixed seed, so a failure can be repeated.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "flash_mla/c_api.h"
#include "flash_mla/tensor.h"
#include "fuzzer.h"
#include "reference/decode.h"
#include "reference/merge.h"
#include "reference/tolerance.h"
#include "test_tensor.h"

namespace flash_mla::test {
namespace {

constexpr int kDecodeCalls = 6000;
constexpr int kAppendCalls = 2500;
constexpr int kMergeCalls = 2500;

TEST(Fuzz, Decode) {
  Fuzzer fuzz(20261123);
  int right = 0, refused = 0;
  for (int call = 0; right + refused < kDecodeCalls; ++call) {
    SCOPED_TRACE(call);
    const DType dtype = fuzz.pick({DType::kBf16, DType::kFp16, DType::kFp32});
    const std::int64_t b = fuzz.draw(1, 2), s_q = fuzz.draw(1, 2), h_kv = fuzz.draw(1, 2);
    const std::int64_t h_q = h_kv * fuzz.draw(1, 2), page_size = fuzz.draw(1, 9), num_pages = 5;
    const std::int64_t max_pages = 3;
    Arena q = fuzz.make(dtype, {b, s_q, h_q, 576});
    Arena kv_cache = fuzz.make(dtype, {num_pages, page_size, h_kv, 576});
    Arena table = fuzz.make(DType::kInt32, {b, max_pages});
    Arena lengths = fuzz.make(DType::kInt32, {b});
    Arena out = fuzz.make(dtype, {b, s_q, h_q, 512});
    Arena lse = fuzz.make(DType::kFp32, {b, h_q, s_q});
    Arena metadata = fuzz.make(DType::kInt32, {1, 8});
    Arena num_splits = fuzz.make(DType::kInt32, {b + 1});
    const auto fill = [&](Arena& arena, std::int64_t low, std::int64_t high, bool wild) {
      for (std::size_t i = 0; i < arena.bytes.size(); i += sizeof(std::int32_t)) {
        auto value = static_cast<std::int32_t>(fuzz.draw(low, high));
        if (wild && fuzz.chance(2)) value = fuzz.pick({-1, 2147480000, -2147483647, 100});
        std::memcpy(&arena.bytes[i], &value, sizeof(value));
      }
    };
    const bool clean = fuzz.chance(10);
    fill(table, 0, num_pages - 1, !clean);
    fill(lengths, 0, max_pages * page_size, !clean);

    flash_mla_decode_args args = {};
    args.struct_size = sizeof(args);
    args.causal = fuzz.chance(50) ? 1 : 0;
    args.empty_lse = fuzz.chance(50) ? 1 : 0;
    if (fuzz.chance(30)) lse.tensor = {};
    const std::vector<std::pair<Arena*, int>> tensors = {{&q, 4},       {&kv_cache, 4}, {&table, 2},
                                                         {&lengths, 1}, {&out, 4},      {&lse, 3}};
    bool has_plan = fuzz.chance(20), must_fail = false;
    if (!clean) {
      for (std::int64_t changes = fuzz.draw(1, 3); changes > 0; --changes) {
        if (fuzz.chance(75)) {
          fuzz.mutate(tensors[fuzz.draw(0, 5)].first->tensor);
        } else if (has_plan && fuzz.chance(50)) {
          fuzz.mutate(fuzz.chance(70) ? metadata.tensor : num_splits.tensor);
        } else if (fuzz.chance(30)) {
          args.struct_size = fuzz.pick<std::size_t>({0, 8, sizeof(args) - 1, sizeof(args) + 64});
          must_fail = args.struct_size < sizeof(args);
        } else if (fuzz.chance(50)) {
          args.has_softmax_scale = fuzz.pick({0, 1, 2});
          args.softmax_scale = fuzz.pick({0.0, 0.5, -1.0, std::nan(""), HUGE_VAL, 1e300});
        } else {
          *fuzz.pick({&args.causal, &args.empty_lse, &args.batch_invariant, &args.validate}) =
              fuzz.pick({0, 1, 2, -1});
        }
      }
    }
    Judgement judgement;
    for (const auto& [arena, rank] : tensors) judgement.add(*arena, rank);
    if (has_plan) {
      judgement.add(metadata, 2);
      judgement.add(num_splits, 1);
    }
    if (!judgement.callable() && !must_fail) continue;
    args.q = q.tensor;
    args.kv_cache = kv_cache.tensor;
    args.block_table = table.tensor;
    args.cache_seqlens = lengths.tensor;
    args.out = out.tensor;
    args.lse = lse.tensor;
    const flash_mla_plan plan = {sizeof(plan), metadata.tensor, num_splits.tensor};
    const std::vector<std::byte> out_before = out.bytes, lse_before = lse.bytes;

    std::int32_t parts = 0;
    std::size_t counters = 0, partials = 0;
    char text[40];
    flash_mla_plan_size(&args, &parts);
    flash_mla_workspace_size(&args, &counters, &partials);
    flash_mla_describe_decode(&args, text, sizeof(text));
    const flash_mla_status supported = flash_mla_is_supported(&args);
    const flash_mla_status status =
        flash_mla_decode(&args, has_plan ? &plan : nullptr, nullptr, nullptr);
    if (status.code != FLASH_MLA_OK) {
      ++refused;
      ASSERT_FALSE(clean) << status.message;
      ASSERT_EQ(std::string(status.message).rfind("decode: ", 0), 0u) << status.message;
      ASSERT_TRUE(out.bytes == out_before && lse.bytes == lse_before) << status.message;
      continue;
    }
    ++right;
    ASSERT_FALSE(must_fail || judgement.must_fail());
    ASSERT_EQ(supported.code, FLASH_MLA_OK) << supported.message;
    reference::DecodeProblem problem;
    problem.format = format_of(static_cast<DType>(q.tensor.dtype));
    problem.b = static_cast<int>(q.tensor.shape[0]);
    problem.s_q = static_cast<int>(q.tensor.shape[1]);
    problem.h_q = static_cast<int>(q.tensor.shape[2]);
    problem.h_kv = static_cast<int>(kv_cache.tensor.shape[2]);
    problem.page_size = static_cast<int>(kv_cache.tensor.shape[1]);
    problem.max_pages = static_cast<int>(table.tensor.shape[1]);
    if (args.has_softmax_scale != 0) problem.softmax_scale = args.softmax_scale;
    problem.causal = args.causal != 0;
    problem.empty_lse = args.empty_lse == 0 ? HUGE_VAL : -HUGE_VAL;
    problem.q = read_values(view_of(q.tensor));
    problem.kv = read_values(view_of(kv_cache.tensor));
    const std::vector<double> table_values = read_values(view_of(table.tensor));
    const std::vector<double> length_values = read_values(view_of(lengths.tensor));
    problem.table.assign(table_values.begin(), table_values.end());
    problem.lengths.assign(length_values.begin(), length_values.end());
    const reference::DecodeResult exact = reference::decode(problem);
    const reference::DecodeResult plain = reference::decode_plainly(problem);
    const std::vector<double> got = read_values(view_of(out.tensor));
    ASSERT_EQ(got.size(), exact.out.size());
    const reference::Errors errors = reference::compare_out(
        problem.format, got.data(), exact.out.data(), plain.out.data(), got.size(),
        reference::score_error(exact.lse.data(), exact.lse.size()));
    ASSERT_TRUE(errors.ok()) << errors.got << " > " << errors.allowed;
    ASSERT_TRUE(only_elements_changed(out_before, out));
    if (lse.tensor.dtype == 0) continue;
    const std::vector<double> got_lse = read_values(view_of(lse.tensor));
    const reference::Errors lse_errors =
        reference::compare_lse(got_lse.data(), exact.lse.data(), plain.lse.data(), got_lse.size());
    ASSERT_TRUE(lse_errors.ok()) << lse_errors.got << " > " << lse_errors.allowed;
    ASSERT_TRUE(only_elements_changed(lse_before, lse));
  }
  EXPECT_GT(right, kDecodeCalls / 10);
  EXPECT_GT(refused, kDecodeCalls / 4);
}

TEST(Fuzz, AppendKv) {
  Fuzzer fuzz(2);
  int right = 0, refused = 0;
  while (right + refused < kAppendCalls) {
    SCOPED_TRACE(right + refused);
    const DType dtype = fuzz.pick({DType::kBf16, DType::kFp16, DType::kFp32});
    const std::int64_t t = fuzz.draw(0, 5), page_size = fuzz.draw(1, 7), num_pages = 3;
    Arena kv_c = fuzz.make(dtype, {t, 512}), k_pe = fuzz.make(dtype, {t, 64});
    const bool has_head = fuzz.chance(50);
    Arena kv_cache = has_head ? fuzz.make(dtype, {num_pages, page_size, 1, 576})
                              : fuzz.make(dtype, {num_pages, page_size, 576});
    Arena slots = fuzz.make(DType::kInt64, {t});
    const bool clean = fuzz.chance(20);
    for (std::size_t i = 0; i < slots.bytes.size(); i += sizeof(std::int64_t)) {
      std::int64_t slot = fuzz.draw(-1, num_pages * page_size - 1);
      if (!clean && fuzz.chance(3)) {
        slot = fuzz.pick<std::int64_t>({100, std::int64_t{1} << 62, -5, 1 << 31});
      }
      std::memcpy(&slots.bytes[i], &slot, sizeof(slot));
    }
    flash_mla_append_kv_args args = {};
    args.struct_size = sizeof(args);
    bool must_fail = false;
    if (!clean) {
      for (std::int64_t changes = fuzz.draw(0, 2); changes > 0; --changes) {
        fuzz.mutate(fuzz.pick({&kv_c, &k_pe, &kv_cache, &slots})->tensor);
      }
      if (fuzz.chance(3)) {
        args.struct_size = 16;
        must_fail = true;
      }
    }
    Judgement judgement;
    judgement.add(kv_c, 2);
    judgement.add(k_pe, 2);
    judgement.add(kv_cache, kv_cache.tensor.rank == 3 ? 3 : 4);
    judgement.add(slots, 1);
    if (!judgement.callable() && !must_fail) continue;
    args.kv_c = kv_c.tensor;
    args.k_pe = k_pe.tensor;
    args.kv_cache = kv_cache.tensor;
    args.slot_mapping = slots.tensor;
    std::vector<std::byte> expected = kv_cache.bytes;
    const std::int64_t offset =
        static_cast<std::byte*>(kv_cache.tensor.data) - kv_cache.bytes.data();
    const flash_mla_status status = flash_mla_append_kv(&args, nullptr);
    if (status.code != FLASH_MLA_OK) {
      ++refused;
      ASSERT_FALSE(clean) << status.message;
      ASSERT_TRUE(kv_cache.bytes == expected) << status.message;
      continue;
    }
    ++right;
    ASSERT_FALSE(must_fail || judgement.must_fail());
    const TensorView kv = view_of(kv_cache.tensor), latent = view_of(kv_c.tensor);
    const TensorView rope = view_of(k_pe.tensor);
    const std::size_t size = dtype_size(kv.dtype);
    for (std::int64_t i = 0; i < latent.shape[0]; ++i) {
      std::int64_t slot;
      std::memcpy(&slot, static_cast<std::byte*>(slots.tensor.data) + i * sizeof(slot),
                  sizeof(slot));
      if (slot < 0) continue;
      ASSERT_LT(slot, kv.shape[0] * kv.shape[1]);
      const std::int64_t row =
          slot / kv.shape[1] * kv.stride[0] + slot % kv.shape[1] * kv.stride[1];
      std::byte* at = expected.data() + offset + row * size;
      std::memcpy(at, static_cast<std::byte*>(latent.data) + i * latent.stride[0] * size,
                  512 * size);
      std::memcpy(at + 512 * size, static_cast<std::byte*>(rope.data) + i * rope.stride[0] * size,
                  64 * size);
    }
    ASSERT_TRUE(kv_cache.bytes == expected);
  }
  EXPECT_GT(right, kAppendCalls / 5);
  EXPECT_GT(refused, kAppendCalls / 5);
}

TEST(Fuzz, MergeStates) {
  Fuzzer fuzz(3);
  int right = 0, refused = 0;
  while (right + refused < kMergeCalls) {
    SCOPED_TRACE(right + refused);
    const DType dtype = fuzz.pick({DType::kBf16, DType::kFp16, DType::kFp32});
    const DType out_dtype = fuzz.chance(70) ? dtype : DType::kFp32;
    const std::int64_t b = fuzz.draw(0, 2), s_q = fuzz.draw(1, 2), h_q = fuzz.draw(1, 3);
    const std::int64_t d = 8 * fuzz.draw(1, 9);
    const int parts = static_cast<int>(fuzz.draw(1, 4));
    std::vector<Arena> outs, lses;
    for (int part = 0; part < parts; ++part) {
      outs.push_back(fuzz.make(dtype, {b, s_q, h_q, d}));
      lses.push_back(fuzz.make(DType::kFp32, {b, h_q, s_q}));
    }
    Arena out = fuzz.make(out_dtype, {b, s_q, h_q, d});
    Arena lse = fuzz.make(DType::kFp32, {b, h_q, s_q});
    flash_mla_merge_states_args args = {};
    args.struct_size = sizeof(args);
    args.num_parts = parts;
    const bool clean = fuzz.chance(20);
    bool must_fail = false;
    if (!clean) {
      for (std::int64_t changes = fuzz.draw(0, 2); changes > 0; --changes) {
        const std::int64_t part = fuzz.draw(0, parts - 1);
        fuzz.mutate(fuzz.pick({&outs[part], &lses[part], &out, &lse})->tensor);
      }
      if (fuzz.chance(5)) args.empty_lse = fuzz.pick({1, -1, 2});
      if (fuzz.chance(3)) {
        args.num_parts = fuzz.pick({0, -1});
        must_fail = true;
      }
    }
    Judgement judgement;
    for (int part = 0; part < parts; ++part) {
      judgement.add(outs[part], 4);
      judgement.add(lses[part], 3);
    }
    judgement.add(out, 4);
    judgement.add(lse, 3);
    if (!judgement.callable() && !must_fail) continue;
    std::vector<flash_mla_tensor> out_tensors, lse_tensors;
    for (int part = 0; part < parts; ++part) {
      out_tensors.push_back(outs[part].tensor);
      lse_tensors.push_back(lses[part].tensor);
    }
    args.outs = out_tensors.data();
    args.lses = lse_tensors.data();
    args.out = out.tensor;
    args.lse = lse.tensor;
    const std::vector<std::byte> out_before = out.bytes, lse_before = lse.bytes;
    const flash_mla_status status = flash_mla_merge_states(&args, nullptr);
    if (status.code != FLASH_MLA_OK) {
      ++refused;
      ASSERT_FALSE(clean) << status.message;
      ASSERT_TRUE(out.bytes == out_before && lse.bytes == lse_before) << status.message;
      continue;
    }
    ++right;
    ASSERT_FALSE(must_fail || judgement.must_fail());
    // lse's axes in the order of out's rows.
    const auto lse_by_row = [](flash_mla_tensor tensor) {
      std::swap(tensor.shape[1], tensor.shape[2]);
      std::swap(tensor.stride[1], tensor.stride[2]);
      return read_values(view_of(tensor));
    };
    std::vector<std::vector<double>> out_values, lse_values;
    for (int part = 0; part < parts; ++part) {
      out_values.push_back(read_values(view_of(outs[part].tensor)));
      lse_values.push_back(lse_by_row(lses[part].tensor));
    }
    const auto width = static_cast<std::size_t>(out.tensor.shape[3]);
    const double empty_lse = args.empty_lse == 0 ? HUGE_VAL : -HUGE_VAL;
    const reference::Format format = format_of(static_cast<DType>(out.tensor.dtype));
    const auto exact = reference::merge_with<double>(out_values, lse_values, width, empty_lse);
    auto plain = reference::merge_with<float>(out_values, lse_values, width, empty_lse);
    for (double& value : plain.out) value = reference::round_to(format, value);
    const std::vector<double> got = read_values(view_of(out.tensor));
    const reference::Errors errors =
        reference::compare_out(format, got.data(), exact.out.data(), plain.out.data(), got.size(),
                               reference::score_error(exact.lse.data(), exact.lse.size()));
    ASSERT_TRUE(errors.ok()) << errors.got << " > " << errors.allowed;
    const std::vector<double> got_lse = lse_by_row(lse.tensor);
    const reference::Errors lse_errors =
        reference::compare_lse(got_lse.data(), exact.lse.data(), plain.lse.data(), got_lse.size());
    ASSERT_TRUE(lse_errors.ok()) << lse_errors.got << " > " << lse_errors.allowed;
    ASSERT_TRUE(only_elements_changed(out_before, out));
    ASSERT_TRUE(only_elements_changed(lse_before, lse));
  }
  EXPECT_GT(right, kMergeCalls / 5);
  EXPECT_GT(refused, kMergeCalls / 5);
}

TEST(Fuzz, NullArguments) {
  flash_mla_decode_args args = {};
  args.struct_size = sizeof(args);
  const auto expect = [](const flash_mla_status& status, const char* message) {
    EXPECT_EQ(status.code, FLASH_MLA_INVALID_ARGUMENT);
    EXPECT_STREQ(status.message, message);
  };
  std::int32_t parts;
  std::size_t counters, partials;
  char text[8];
  expect(flash_mla_plan_size(nullptr, &parts), "plan_size: args = null, wanted a pointer");
  expect(flash_mla_workspace_size(nullptr, &counters, &partials),
         "workspace_size: args = null, wanted a pointer");
  expect(flash_mla_init_workspace(nullptr, 0, 0, nullptr),
         "init_workspace: workspace = null, wanted a pointer");
  expect(flash_mla_plan_decode(nullptr, nullptr, nullptr),
         "plan_decode: args = null, wanted a pointer");
  expect(flash_mla_plan_decode(&args, nullptr, nullptr),
         "plan_decode: plan = null, wanted a pointer");
  expect(flash_mla_decode(nullptr, nullptr, nullptr, nullptr),
         "decode: args = null, wanted a pointer");
  expect(flash_mla_is_supported(nullptr), "is_supported: args = null, wanted a pointer");
  expect(flash_mla_describe_decode(nullptr, text, sizeof(text)),
         "describe_decode: args = null, wanted a pointer");
  expect(flash_mla_append_kv(nullptr, nullptr), "append_kv: args = null, wanted a pointer");
  expect(flash_mla_merge_states(nullptr, nullptr), "merge_states: args = null, wanted a pointer");
  args.struct_size = 8;
  const std::string message =
      "decode: args.struct_size = 8, wanted " + std::to_string(sizeof(args)) + " or more";
  expect(flash_mla_decode(&args, nullptr, nullptr, nullptr), message.c_str());
}

}  // namespace
}  // namespace flash_mla::test
