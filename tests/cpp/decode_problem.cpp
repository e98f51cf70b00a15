// Decode test cases, their tensors, and the comparison with the reference.
#include "decode_problem.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>

#include "reference/tolerance.h"

namespace flash_mla::test {
namespace {

constexpr double kPoison = std::numeric_limits<double>::quiet_NaN();
constexpr std::int32_t kTablePoison = 2147480000;
constexpr int kSparePages = 2;    // of the cache, never used
constexpr int kSpareColumns = 3;  // of the table
constexpr std::int64_t kPad = 8;  // elements between rows of a strided tensor: 16 bytes of bf16

// Strides of a tensor whose axes, from coarse to fine, are stored in `order`, with a gap behind
// every row of the last axis.
std::vector<std::int64_t> padded_stride(const std::vector<std::int64_t>& shape,
                                        const std::vector<int>& order) {
  std::vector<std::int64_t> stride(shape.size(), 1);
  std::int64_t step = shape.back() + kPad;
  for (auto axis = order.rbegin(); axis != order.rend(); ++axis) {
    stride[*axis] = step;
    step *= std::max<std::int64_t>(shape[*axis], 1);
  }
  return stride;
}

}  // namespace

std::ostream& operator<<(std::ostream& stream, const DecodeCase& decode_case) {
  return stream << decode_case.name;
}

const std::vector<DecodeCase>& decode_cases() {
  constexpr DType kFp16 = DType::kFp16, kFp32 = DType::kFp32;
  constexpr EmptyLse kMinusInf = EmptyLse::kNegativeInfinity;
  static const std::vector<DecodeCase> cases = {
      {.name = "one_token", .lengths = {1}},
      {.name = "one_head", .lengths = {77}},
      {.name = "page_edges", .h_q = 3, .lengths = {63, 64, 65, 127, 128, 129, 191, 192, 193}},
      {.name = "heads_9", .h_q = 9, .lengths = {130, 64}},
      {.name = "heads_16_causal", .s_q = 2, .h_q = 16, .lengths = {300, 65}, .causal = true},
      {.name = "heads_63", .h_q = 63, .lengths = {200}},
      {.name = "heads_64", .h_q = 64, .lengths = {100, 333}},
      {.name = "heads_65", .h_q = 65, .lengths = {70}},
      {.name = "heads_126", .h_q = 126, .lengths = {190, 5}},
      {.name = "heads_128", .h_q = 128, .lengths = {256, 31}},
      {.name = "heads_128_sq2", .s_q = 2, .h_q = 128, .lengths = {150}, .causal = true},
      {.name = "h_kv_2", .s_q = 2, .h_q = 6, .h_kv = 2, .lengths = {90, 140}, .causal = true},
      {.name = "h_kv_3_strided", .h_q = 9, .h_kv = 3, .lengths = {120, 70}, .strided = true},
      {.name = "h_kv_8", .s_q = 2, .h_q = 128, .h_kv = 8, .lengths = {66, 20}},
      {.name = "mha_4", .h_q = 4, .h_kv = 4, .lengths = {100}},
      {.name = "sq3_fp16", .dtype = kFp16, .s_q = 3, .h_q = 9, .lengths = {129}, .causal = true},
      {.name = "sq4_strided",
       .s_q = 4,
       .h_q = 16,
       .lengths = {140, 3},
       .causal = true,
       .strided = true},
      {.name = "sq17", .s_q = 17, .h_q = 3, .lengths = {100, 17}, .causal = true},
      {.name = "sq17_not_causal", .s_q = 17, .h_q = 5, .lengths = {70}},
      {.name = "sq128", .s_q = 128, .h_q = 1, .lengths = {128, 200}, .causal = true},
      {.name = "sq128_heads_3", .s_q = 128, .h_q = 3, .lengths = {150}, .causal = true},
      {.name = "empty_requests", .h_q = 4, .lengths = {0, 65, 0, 0, 7, 0}},
      {.name = "all_empty", .s_q = 2, .h_q = 4, .lengths = {0, 0, 0}, .empty_lse = kMinusInf},
      {.name = "rows_without_keys", .s_q = 4, .h_q = 5, .lengths = {2, 0, 1, 66}, .causal = true},
      {.name = "rows_without_keys_minus_inf",
       .s_q = 70,
       .h_q = 2,
       .lengths = {3, 69},
       .causal = true,
       .empty_lse = kMinusInf},
      {.name = "no_lse", .h_q = 16, .lengths = {80}, .with_lse = false},
      {.name = "scale_large", .h_q = 16, .lengths = {200, 64}, .softmax_scale = 1.0},
      {.name = "scale_negative", .h_q = 4, .lengths = {100}, .softmax_scale = -0.1},
      {.name = "scale_zero", .h_q = 4, .lengths = {100}, .softmax_scale = 0.0},
      {.name = "fp16", .dtype = kFp16, .h_q = 16, .lengths = {100, 300}},
      {.name = "fp16_strided",
       .dtype = kFp16,
       .s_q = 2,
       .h_q = 128,
       .lengths = {66, 129},
       .causal = true,
       .strided = true},
      {.name = "long", .h_q = 2, .lengths = {20000, 5}},
      {.name = "long_heads_16", .h_q = 16, .lengths = {4100}},
      {.name = "long_heads_128", .h_q = 128, .lengths = {1100, 513}},
      {.name = "many_requests", .h_q = 1, .lengths = std::vector<std::int32_t>(300, 33)},
      {.name = "many_chunks", .h_q = 1, .lengths = std::vector<std::int32_t>(66, 513)},
      {.name = "uneven",
       .s_q = 2,
       .h_q = 2,
       .lengths = {4096, 1, 64, 900, 0, 17, 2000},
       .causal = true},
      {.name = "fp32", .dtype = kFp32, .s_q = 2, .h_q = 16, .lengths = {100, 65}, .causal = true},
      {.name = "fp32_strided", .dtype = kFp32, .h_q = 3, .lengths = {300}, .strided = true},
      {.name = "page_1", .h_q = 4, .page_size = 1, .lengths = {70, 3}},
      {.name = "page_16",
       .s_q = 2,
       .h_q = 16,
       .page_size = 16,
       .lengths = {15, 16, 17, 100},
       .causal = true},
      {.name = "page_17_fp32", .dtype = kFp32, .h_q = 5, .page_size = 17, .lengths = {200, 34}},
      {.name = "page_32_fp16", .dtype = kFp16, .h_q = 9, .page_size = 32, .lengths = {200}},
      {.name = "page_128_strided",
       .h_q = 16,
       .page_size = 128,
       .lengths = {300, 128},
       .strided = true},
      {.name = "page_256",
       .s_q = 3,
       .h_q = 16,
       .page_size = 256,
       .lengths = {257, 1000},
       .causal = true},
  };
  return cases;
}

std::vector<DecodeCase> gpu_decode_cases() {
  std::vector<DecodeCase> cases;
  for (const DecodeCase& decode_case : decode_cases()) {
    if (decode_case.page_size == 64 && decode_case.dtype != DType::kFp32) {
      cases.push_back(decode_case);
    }
  }
  return cases;
}

DecodeProblem::DecodeProblem(const DecodeCase& decode_case, std::uint32_t seed)
    : case_(decode_case) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0.0, case_.deviation);
  const auto b = static_cast<int>(case_.lengths.size());
  int used_pages = 0, most_pages = 0;
  for (const int length : case_.lengths) {
    const int pages = (length + case_.page_size - 1) / case_.page_size;
    used_pages += pages;
    most_pages = std::max(most_pages, pages);
  }
  const int num_pages = used_pages + kSparePages;
  const int max_pages = most_pages + kSpareColumns;

  const std::vector<std::int64_t> q_shape = {b, case_.s_q, case_.h_q, kHeadDimQk};
  const std::vector<std::int64_t> kv_shape = {num_pages, case_.page_size, case_.h_kv, kHeadDimQk};
  const std::vector<std::int64_t> out_shape = {b, case_.s_q, case_.h_q, kHeadDimV};
  const std::vector<std::int64_t> lse_shape = {b, case_.h_q, case_.s_q};
  if (case_.strided) {
    q = TestTensor(case_.dtype, q_shape, padded_stride(q_shape, {2, 0, 1}));
    kv_cache = TestTensor(case_.dtype, kv_shape, padded_stride(kv_shape, {2, 0, 1}));
    block_table = TestTensor(DType::kInt32, {b, max_pages}, {max_pages + 5, 1});
  } else {
    q = TestTensor(case_.dtype, q_shape);
    kv_cache = TestTensor(case_.dtype, kv_shape);
    block_table = TestTensor(DType::kInt32, {b, max_pages});
  }
  cache_seqlens = TestTensor(DType::kInt32, {b});
  clear_outputs();

  reference.format = format_of(case_.dtype);
  reference.b = b;
  reference.s_q = case_.s_q;
  reference.h_q = case_.h_q;
  reference.h_kv = case_.h_kv;
  reference.page_size = case_.page_size;
  reference.max_pages = max_pages;
  // The library computes with the float.
  reference.softmax_scale = static_cast<float>(case_.softmax_scale);
  reference.causal = case_.causal;
  reference.empty_lse = case_.empty_lse == EmptyLse::kPositiveInfinity ? HUGE_VAL : -HUGE_VAL;
  reference.lengths = case_.lengths;

  const auto draw = [&] { return reference::round_to(reference.format, normal(random)); };
  reference.q.resize(q.num_elements());
  std::generate(reference.q.begin(), reference.q.end(), draw);
  std::vector<std::int32_t> pages(num_pages);
  std::iota(pages.begin(), pages.end(), 0);
  std::shuffle(pages.begin(), pages.end(), random);
  reference.table.assign(std::size_t(b) * max_pages, kTablePoison);
  reference.kv.assign(kv_cache.num_elements(), kPoison);
  const std::int64_t row_size = std::int64_t{case_.h_kv} * kHeadDimQk;
  int next_page = 0;
  for (int request = 0; request < b; ++request) {
    for (int token = 0; token < case_.lengths[request]; ++token) {
      std::int32_t& page = reference.table[request * max_pages + token / case_.page_size];
      if (token % case_.page_size == 0) page = pages[next_page++];
      const std::int64_t row = std::int64_t{page} * case_.page_size + token % case_.page_size;
      std::generate_n(reference.kv.begin() + row * row_size, row_size, draw);
    }
  }
  q.set_all(reference.q);
  kv_cache.set_all(reference.kv);
  block_table.set_all({reference.table.begin(), reference.table.end()});
  cache_seqlens.set_all({reference.lengths.begin(), reference.lengths.end()});
}

void DecodeProblem::clear_outputs() {
  const auto b = static_cast<std::int64_t>(case_.lengths.size());
  const std::vector<std::int64_t> out_shape = {b, case_.s_q, case_.h_q, kHeadDimV};
  const std::vector<std::int64_t> lse_shape = {b, case_.h_q, case_.s_q};
  std::vector<std::int64_t> out_stride, lse_stride;
  if (case_.strided) {
    out_stride = padded_stride(out_shape, {1, 0, 2});
    lse_stride = {3, 3 * b + 1, (3 * b + 1) * case_.h_q + 2};
  }
  out = TestTensor(case_.dtype, out_shape, out_stride);
  lse = case_.with_lse ? TestTensor(DType::kFp32, lse_shape, lse_stride) : TestTensor();
}

DecodeArgs DecodeProblem::args(Place&& place) {
  DecodeArgs args;
  args.q = place.put(q);
  args.kv_cache = place.put(kv_cache);
  args.block_table = place.put(block_table);
  args.cache_seqlens = place.put(cache_seqlens);
  args.out = place.put(out);
  args.lse = place.put(lse);
  args.softmax_scale = case_.softmax_scale;
  args.causal = case_.causal;
  args.empty_lse = case_.empty_lse;
  return args;
}

void DecodeProblem::check_result() {
  const reference::DecodeResult exact = reference::decode(reference);
  const reference::DecodeResult plain = reference::decode_plainly(reference);
  const std::vector<double> got_out = out.values();
  const std::vector<double> got_lse = case_.with_lse ? lse.values() : exact.lse;
  const std::size_t rows = std::size_t(reference.s_q) * reference.h_q;
  for (int request = 0; request < reference.b; ++request) {
    const std::size_t row = request * rows, element = row * kHeadDimV;
    const auto out_errors = reference::compare_out(
        reference.format, &got_out[element], &exact.out[element], &plain.out[element],
        rows * kHeadDimV, reference::score_error(&exact.lse[row], rows));
    EXPECT_TRUE(out_errors.ok()) << "out of request " << request << " errs by " << out_errors.got
                                 << ", allowed " << out_errors.allowed << ", at row "
                                 << out_errors.at / kHeadDimV << ", column "
                                 << out_errors.at % kHeadDimV;
    const auto lse_errors =
        reference::compare_lse(&got_lse[row], &exact.lse[row], &plain.lse[row], rows);
    EXPECT_TRUE(lse_errors.ok()) << "lse of request " << request << " errs by " << lse_errors.got
                                 << ", allowed " << lse_errors.allowed << ", at row "
                                 << lse_errors.at;
  }
  EXPECT_TRUE(out.guards_intact()) << "written outside out";
  EXPECT_TRUE(!case_.with_lse || lse.guards_intact()) << "written outside lse";
}

}  // namespace flash_mla::test
