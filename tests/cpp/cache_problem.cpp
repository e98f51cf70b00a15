// append_kv and merge_states test cases, for the CPU and for the GPU.
#include "cache_problem.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "reference/merge.h"
#include "reference/tolerance.h"

namespace flash_mla::test {
namespace {

constexpr int kRopeDim = kHeadDimQk - kHeadDimV;

std::vector<double> draw(std::size_t count, DType dtype, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::vector<double> values(count);
  for (double& value : values) value = reference::round_to(format_of(dtype), normal(random));
  return values;
}

}  // namespace

std::vector<AppendCase> append_cases() {
  constexpr DType kBf16 = DType::kBf16, kFp16 = DType::kFp16;
  std::vector<std::int64_t> many;
  for (int i = 0; i < 1000; ++i) many.push_back((i * 7919) % (20 * 64));
  std::sort(many.begin(), many.end());
  many.erase(std::unique(many.begin(), many.end()), many.end());
  std::shuffle(many.begin(), many.end(), std::mt19937(7));
  return {
      {kBf16, 64, 3, false, false, {0}},
      {kBf16, 64, 3, false, true, {191, -1, 0, 63, 64, -1000000}},
      {kFp16, 64, 3, true, false, {5, 70, 6, -1}},
      {kBf16, 16, 4, true, true, {63, 1, 17}},
      {kFp16, 1, 5, false, false, {4, 2, 0}},
      {kBf16, 256, 2, false, true, {511, 256, 255, -9}},
      {kBf16, 64, 20, false, false, many},
      {kFp16, 64, 20, true, true, many},
      {kBf16, 64, 1, false, false, {-1, -2}},
  };
}

void check_append(const AppendCase& append_case, Place& place, StreamHandle stream,
                  const std::function<void()>& synchronize) {
  const DType dtype = append_case.dtype;
  const auto t = static_cast<std::int64_t>(append_case.slots.size());
  const std::int64_t page_size = append_case.page_size, num_pages = append_case.num_pages;
  std::mt19937 random(3);

  std::vector<std::int64_t> kv_shape = {num_pages, page_size, kHeadDimQk};
  std::vector<std::int64_t> kv_stride;
  // One layer of an allocation that holds three layers' rows side by side; odd strides where the
  // layout allows them.
  if (append_case.strided) kv_stride = {page_size * 3 * kHeadDimQk + 7, 3 * kHeadDimQk, 1};
  if (append_case.with_head_axis) {
    kv_shape.insert(kv_shape.begin() + 2, 1);
    if (!kv_stride.empty()) kv_stride.insert(kv_stride.begin() + 2, kHeadDimQk);
  }
  TestTensor kv_cache(dtype, kv_shape, kv_stride);
  TestTensor kv_c = append_case.strided ? TestTensor(dtype, {t, kHeadDimV}, {kHeadDimV + 9, 1})
                                        : TestTensor(dtype, {t, kHeadDimV});
  TestTensor k_pe = append_case.strided ? TestTensor(dtype, {t, kRopeDim}, {kHeadDimQk, 1})
                                        : TestTensor(dtype, {t, kRopeDim});
  TestTensor slots(DType::kInt64, {t});
  const std::vector<double> latent = draw(t * kHeadDimV, dtype, random);
  const std::vector<double> rope = draw(t * kRopeDim, dtype, random);
  std::vector<double> expected = draw(num_pages * page_size * kHeadDimQk, dtype, random);
  kv_c.set_all(latent);
  k_pe.set_all(rope);
  kv_cache.set_all(expected);
  slots.set_all({append_case.slots.begin(), append_case.slots.end()});
  for (std::int64_t i = 0; i < t; ++i) {
    if (append_case.slots[i] < 0) continue;
    double* row = &expected[append_case.slots[i] * kHeadDimQk];
    std::copy_n(&latent[i * kHeadDimV], kHeadDimV, row);
    std::copy_n(&rope[i * kRopeDim], kRopeDim, row + kHeadDimV);
  }

  const Status status =
      append_kv({place.put(kv_c), place.put(k_pe), place.put(kv_cache), place.put(slots)}, stream);
  ASSERT_TRUE(status.ok()) << status.message();
  synchronize();
  place.take_back(kv_cache);
  EXPECT_EQ(kv_cache.values(), expected);
  EXPECT_TRUE(kv_cache.guards_intact());
}

std::vector<MergeCase> merge_cases() {
  constexpr DType kBf16 = DType::kBf16, kFp16 = DType::kFp16, kFp32 = DType::kFp32;
  return {
      {.parts = 1, .b = 2, .h_q = 3},
      {.parts = 2, .b = 3, .s_q = 2, .h_q = 16},
      {.dtype = kFp16, .out_dtype = kFp16, .parts = 3, .b = 2, .s_q = 3, .h_q = 5, .strided = true},
      {.dtype = kFp32, .out_dtype = kFp32, .parts = 5, .b = 2, .s_q = 1, .h_q = 7},
      {.out_dtype = kFp32, .parts = 64, .b = 1, .s_q = 2, .h_q = 9},
      {.dtype = kFp16, .out_dtype = kFp32, .parts = 4, .h_q = 4, .d = 8, .strided = true},
      {.parts = 2, .b = 2, .h_q = 4, .d = 1024},
      {.parts = 3, .b = 2, .h_q = 4, .d = 72, .empty_lse = EmptyLse::kNegativeInfinity},
      {.dtype = kBf16, .parts = 3, .b = 4, .s_q = 2, .h_q = 8, .in_place = true},
      {.parts = 2, .b = 40, .s_q = 1, .h_q = 128},
  };
}

void check_merge(const MergeCase& merge_case, Place& place, StreamHandle stream,
                 const std::function<void()>& synchronize) {
  const std::int64_t b = merge_case.b, s_q = merge_case.s_q, h_q = merge_case.h_q, d = merge_case.d;
  const std::size_t rows = b * s_q * h_q;
  const double empty_lse =
      merge_case.empty_lse == EmptyLse::kPositiveInfinity ? HUGE_VAL : -HUGE_VAL;
  std::mt19937 random(5);
  std::uniform_int_distribution<int> die(0, 7);

  const auto make_out = [&](DType dtype) {
    return merge_case.strided
               ? TestTensor(dtype, {b, s_q, h_q, d}, {d + 1, b * (d + 1) * h_q, b * (d + 1), 1})
               : TestTensor(dtype, {b, s_q, h_q, d});
  };
  const auto make_lse = [&] {
    return merge_case.strided ? TestTensor(DType::kFp32, {b, h_q, s_q}, {2, 2 * b * s_q, 2 * b})
                              : TestTensor(DType::kFp32, {b, h_q, s_q});
  };
  // Index in [b, h_q, s_q] of row `row` of [b, s_q, h_q].
  const auto lse_index = [&](std::size_t row) {
    const std::size_t h = row % h_q, s = row / h_q % s_q, request = row / h_q / s_q;
    return (request * h_q + h) * s_q + s;
  };

  std::vector<TestTensor> outs, lses;
  std::vector<std::vector<double>> out_values, lse_values;
  for (int part = 0; part < merge_case.parts; ++part) {
    outs.push_back(make_out(merge_case.dtype));
    lses.push_back(make_lse());
    out_values.push_back(draw(rows * d, merge_case.dtype, random));
    lse_values.push_back(draw(rows, DType::kFp32, random));
    for (std::size_t row = 0; row < rows; ++row) {
      // Some parts saw no key of some rows, and the first row is seen by none; what they say there
      // is poison.
      const int face = row == 0 ? 0 : die(random);
      if (face > 1) continue;
      lse_values[part][row] = face == 0 ? HUGE_VAL : -HUGE_VAL;
      std::fill_n(&out_values[part][row * d], d, std::nan(""));
    }
    outs[part].set_all(out_values[part]);
    for (std::size_t row = 0; row < rows; ++row) {
      lses[part].set(lse_index(row), lse_values[part][row]);
    }
  }
  TestTensor own_out = make_out(merge_case.out_dtype), own_lse = make_lse();
  TestTensor& out = merge_case.in_place ? outs[0] : own_out;
  TestTensor& lse = merge_case.in_place ? lses[0] : own_lse;

  std::vector<TensorView> out_views, lse_views;
  for (int part = 0; part < merge_case.parts; ++part) {
    out_views.push_back(place.put(outs[part]));
    lse_views.push_back(place.put(lses[part]));
  }
  MergeStatesArgs args;
  args.outs = out_views.data();
  args.lses = lse_views.data();
  args.num_parts = merge_case.parts;
  args.out = merge_case.in_place ? out_views[0] : place.put(out);
  args.lse = merge_case.in_place ? lse_views[0] : place.put(lse);
  args.empty_lse = merge_case.empty_lse;
  const Status status = merge_states(args, stream);
  ASSERT_TRUE(status.ok()) << status.message();
  synchronize();
  place.take_back(out);
  place.take_back(lse);

  const reference::Format format = format_of(merge_case.out_dtype);
  const auto exact = reference::merge_with<double>(out_values, lse_values, d, empty_lse);
  auto plain = reference::merge_with<float>(out_values, lse_values, d, empty_lse);
  for (double& value : plain.out) value = reference::round_to(format, value);
  const std::vector<double> got = out.values(), got_lse = lse.values();
  const reference::Errors out_errors =
      reference::compare_out(format, got.data(), exact.out.data(), plain.out.data(), got.size(),
                             reference::score_error(exact.lse.data(), exact.lse.size()));
  EXPECT_TRUE(out_errors.ok()) << "out errs by " << out_errors.got << ", allowed "
                               << out_errors.allowed << ", at row " << out_errors.at / d;
  std::vector<double> got_lse_rows(rows);
  for (std::size_t row = 0; row < rows; ++row) got_lse_rows[row] = got_lse[lse_index(row)];
  const reference::Errors lse_errors = reference::compare_lse(
      got_lse_rows.data(), exact.lse.data(), plain.lse.data(), got_lse_rows.size());
  EXPECT_TRUE(lse_errors.ok()) << "lse errs by " << lse_errors.got << ", allowed "
                               << lse_errors.allowed << ", at row " << lse_errors.at;
  EXPECT_TRUE(out.guards_intact());
  EXPECT_TRUE(lse.guards_intact());
}

}  // namespace flash_mla::test
