// bf16, fp16 and fp32 as the oracle knows them: from and to double, rounding to nearest, ties to
// even. Shares no code with src/.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace reference {

enum class Format { kBf16, kFp16, kFp32 };

// Significant bits, the leading one included.
inline int precision(Format format) {
  return format == Format::kBf16 ? 8 : format == Format::kFp16 ? 11 : 24;
}

// Largest relative error of one rounding.
inline double unit_roundoff(Format format) { return std::ldexp(1.0, -precision(format)); }

inline int size_of(Format format) { return format == Format::kFp32 ? 4 : 2; }

// The nearest number of the format, ties to even; finite input within the format's range.
inline double round_to(Format format, double value) {
  if (value == 0.0 || !std::isfinite(value)) return value;
  if (format == Format::kFp32) return static_cast<float>(value);
  const int least_exponent = format == Format::kBf16 ? -126 : -14;
  const int exponent = std::max(std::ilogb(value), least_exponent);
  const double quantum = std::ldexp(1.0, exponent - precision(format) + 1);
  return std::nearbyint(value / quantum) * quantum;
}

inline double load(Format format, const void* address) {
  if (format == Format::kFp32) {
    float value;
    std::memcpy(&value, address, sizeof(value));
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, address, sizeof(bits));
  if (format == Format::kBf16) return std::bit_cast<float>(std::uint32_t{bits} << 16);
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  const double sign = bits >> 15 != 0 ? -1.0 : 1.0;
  if (exponent == 31) return fraction != 0 ? std::nan("") : sign * HUGE_VAL;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

inline void store(Format format, double value, void* address) {
  value = round_to(format, value);
  if (format == Format::kFp32) {
    const float single = static_cast<float>(value);
    std::memcpy(address, &single, sizeof(single));
    return;
  }
  std::uint16_t bits;
  if (format == Format::kBf16) {
    bits =
        static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(static_cast<float>(value)) >> 16);
    if (std::isnan(value)) bits = 0x7fc0;
  } else {
    const int sign = std::signbit(value) ? 0x8000 : 0;
    const double magnitude = std::abs(value);
    if (std::isnan(value)) {
      bits = 0x7e00;
    } else if (magnitude > 65504.0) {
      bits = static_cast<std::uint16_t>(sign | 0x7c00);
    } else if (magnitude < std::ldexp(1.0, -14)) {
      bits = static_cast<std::uint16_t>(sign | static_cast<int>(std::ldexp(magnitude, 24)));
    } else {
      const int exponent = std::ilogb(magnitude);
      const int fraction = static_cast<int>(std::ldexp(magnitude, 10 - exponent)) - 1024;
      bits = static_cast<std::uint16_t>(sign | (exponent + 15) << 10 | fraction);
    }
  }
  std::memcpy(address, &bits, sizeof(bits));
}

}  // namespace reference
