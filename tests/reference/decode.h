// The naive MLA decode: three nested loops in double precision, and the same maths as somebody
// would write it in the tensors' own precision, whose error is the yardstick of tolerance.h. Shares
// no code with src/.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "reference/numbers.h"

namespace reference {

inline constexpr int kDimQk = 576;
inline constexpr int kDimV = 512;

// All arrays are contiguous; q and kv hold numbers of `format`. Rows of kv past a request's length
// and table entries past its last page are never looked at.
struct DecodeProblem {
  Format format = Format::kBf16;
  int b = 0, s_q = 0, h_q = 0, h_kv = 1;
  int page_size = 1, max_pages = 0;
  double softmax_scale = 1.0 / 24.0;
  bool causal = false;
  double empty_lse = std::numeric_limits<double>::infinity();
  std::vector<double> q;              // [b, s_q, h_q, 576]
  std::vector<double> kv;             // [num_pages, page_size, h_kv, 576]
  std::vector<std::int32_t> table;    // [b, max_pages]
  std::vector<std::int32_t> lengths;  // [b]
};

struct DecodeResult {
  std::vector<double> out;  // [b, s_q, h_q, 512]
  std::vector<double> lse;  // [b, h_q, s_q]
};

// Keys that query `s` of request `request` sees.
inline int visible_keys(const DecodeProblem& problem, int request, int s) {
  const int length = problem.lengths[request];
  return problem.causal ? std::clamp(length - problem.s_q + 1 + s, 0, length) : length;
}

inline const double* key(const DecodeProblem& problem, int request, int head, int token) {
  const std::int64_t page =
      problem.table[std::int64_t{request} * problem.max_pages + token / problem.page_size];
  const std::int64_t row = page * problem.page_size + token % problem.page_size;
  return problem.kv.data() + (row * problem.h_kv + head) * kDimQk;
}

// `Real` is what is summed in; `round` is applied to the softmax weights before they meet V, and to
// the output.
template <typename Real, typename Round>
DecodeResult decode_with(const DecodeProblem& problem, Round round) {
  const int group = problem.h_q > 0 ? problem.h_q / problem.h_kv : 1;
  DecodeResult result;
  result.out.assign(problem.q.size() / kDimQk * kDimV, 0.0);
  result.lse.assign(problem.q.size() / kDimQk, problem.empty_lse);
  std::vector<Real> weight, sums(kDimV);
  for (int request = 0; request < problem.b; ++request) {
    for (int s = 0; s < problem.s_q; ++s) {
      for (int h = 0; h < problem.h_q; ++h) {
        const int keys = visible_keys(problem, request, s);
        if (keys == 0) continue;
        const std::int64_t row = (std::int64_t{request} * problem.s_q + s) * problem.h_q + h;
        const double* q = problem.q.data() + row * kDimQk;
        weight.assign(keys, Real{0});
        for (int j = 0; j < keys; ++j) {
          const double* k = key(problem, request, h / group, j);
          for (int d = 0; d < kDimQk; ++d) {
            weight[j] += static_cast<Real>(q[d]) * static_cast<Real>(k[d]);
          }
          weight[j] *= static_cast<Real>(problem.softmax_scale);
        }
        const Real most = *std::max_element(weight.begin(), weight.end());
        Real total{0};
        for (Real& w : weight) {
          w = std::exp(w - most);
          total += w;
        }
        std::fill(sums.begin(), sums.end(), Real{0});
        for (int j = 0; j < keys; ++j) {
          const double* v = key(problem, request, h / group, j);
          const Real w = static_cast<Real>(round(weight[j]));
          for (int d = 0; d < kDimV; ++d) sums[d] += w * static_cast<Real>(v[d]);
        }
        for (int d = 0; d < kDimV; ++d) result.out[row * kDimV + d] = round(sums[d] / total);
        const std::int64_t lse_row = (std::int64_t{request} * problem.h_q + h) * problem.s_q + s;
        result.lse[lse_row] = most + std::log(total);
      }
    }
  }
  return result;
}

// The right answer.
inline DecodeResult decode(const DecodeProblem& problem) {
  return decode_with<double>(problem, [](double value) { return value; });
}

// A plain implementation in the tensors' precision: fp32 sums, weights and output rounded to the
// format.
inline DecodeResult decode_plainly(const DecodeProblem& problem) {
  return decode_with<float>(problem, [&](float value) { return round_to(problem.format, value); });
}

}  // namespace reference
