// How far a result may be from the right answer. The bound is derived, not tuned: a backend may err
// twice as much as a plain implementation in the tensors' own precision does on the same input,
// plus a floor for what rounding alone costs.
//
//   out, per request:  max |got - exact| <= 2 * max |plain - exact| + (2 * u + w) * max |exact|
//   lse, per request:  max |got - exact| <= 2 * max |plain - exact| + w
//   where w = 2^-20 * max(1, max |exact lse|)
//
// u is the unit roundoff of out's format (2^-8 bf16, 2^-11 fp16, 2^-24 fp32): two roundings, one of
// the result and one of a partial result. w is sixteen roundings in fp32 of scores that are of
// lse's size: so far may lse be off, and so far, relatively, may every weight. The rule is
// FlashAttention's (Dao-AILab/flash-attention, tests/), made per request so that the small outputs
// of long requests are held to their own scale. Rows that see no key are exact: out 0, lse as asked
// for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "reference/numbers.h"

namespace reference {

struct Errors {
  double got = 0.0;        // largest error of the result under test
  double allowed = 0.0;    // the bound
  std::ptrdiff_t at = -1;  // where the largest error is
  [[nodiscard]] bool ok() const { return got <= allowed; }
};

inline double largest(const double* values, std::size_t count) {
  double most = 0.0;
  for (std::size_t i = 0; i < count; ++i) {
    if (std::isfinite(values[i])) most = std::max(most, std::abs(values[i]));
  }
  return most;
}

// w above, of `count` lse values.
inline double score_error(const double* exact_lse, std::size_t count) {
  return std::ldexp(std::max(1.0, largest(exact_lse, count)), -20);
}

// Compares `count` numbers; equal infinities differ by nothing, a NaN is an infinite error.
inline Errors compare(const double* got, const double* exact, const double* plain,
                      std::size_t count, double floor) {
  Errors errors;
  double plain_error = 0.0;
  const auto difference = [](double x, double y) {
    if (x == y) return 0.0;
    const double distance = std::abs(x - y);
    return std::isnan(distance) ? HUGE_VAL : distance;
  };
  for (std::size_t i = 0; i < count; ++i) {
    const double error = difference(got[i], exact[i]);
    if (error > errors.got || errors.at < 0) {
      errors.got = error;
      errors.at = static_cast<std::ptrdiff_t>(i);
    }
    if (std::isfinite(exact[i]))
      plain_error = std::max(plain_error, difference(plain[i], exact[i]));
  }
  errors.allowed = 2.0 * plain_error + floor;
  return errors;
}

inline Errors compare_out(Format format, const double* got, const double* exact,
                          const double* plain, std::size_t count, double score_error) {
  const double floor = (2.0 * unit_roundoff(format) + score_error) * largest(exact, count);
  return compare(got, exact, plain, count, floor);
}

inline Errors compare_lse(const double* got, const double* exact, const double* plain,
                          std::size_t count) {
  return compare(got, exact, plain, count, score_error(exact, count));
}

}  // namespace reference
