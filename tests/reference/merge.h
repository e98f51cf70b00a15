// The naive merge of partial attention results in double precision, and the same maths in fp32, the
// yardstick of tolerance.h. Shares no code with src/.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

namespace reference {

struct MergeResult {
  std::vector<double> out;  // [rows, d]
  std::vector<double> lse;  // [rows]
};

// outs[p] is [rows, d], lses[p] is [rows], in the same order of rows. An infinite lse says that the
// part saw no key of that row.
template <typename Real>
MergeResult merge_with(const std::vector<std::vector<double>>& outs,
                       const std::vector<std::vector<double>>& lses, std::size_t d,
                       double empty_lse) {
  const std::size_t rows = lses.front().size();
  MergeResult result = {std::vector<double>(rows * d, 0.0), std::vector<double>(rows, empty_lse)};
  for (std::size_t row = 0; row < rows; ++row) {
    double most = -std::numeric_limits<double>::infinity();
    for (const auto& lse : lses) {
      if (std::isfinite(lse[row])) most = std::max(most, lse[row]);
    }
    Real total{0};
    std::vector<Real> sums(d, Real{0});
    for (std::size_t part = 0; part < outs.size(); ++part) {
      if (!std::isfinite(lses[part][row])) continue;
      const Real weight = std::exp(static_cast<Real>(lses[part][row] - most));
      total += weight;
      for (std::size_t i = 0; i < d; ++i) {
        sums[i] += weight * static_cast<Real>(outs[part][row * d + i]);
      }
    }
    if (total == Real{0}) continue;
    for (std::size_t i = 0; i < d; ++i) result.out[row * d + i] = sums[i] / total;
    result.lse[row] = most + std::log(total);
  }
  return result;
}

}  // namespace reference
