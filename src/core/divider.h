// A divisor that is used often: its reciprocal is worked out once, on the host where possible, and
// a quotient then takes a product and a correction. (A division takes a GPU some twenty
// instructions and a hundred clocks, and a short decode does a dozen before its first load.)
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FLASH_MLA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FLASH_MLA_HOST_DEVICE inline
#endif

namespace flash_mla {

class Divider {
 public:
  // divisor > 0. Converts from and to a plain number, which it is to everybody else.
  FLASH_MLA_HOST_DEVICE constexpr Divider(std::int32_t divisor = 1)  // NOLINT
      : divisor_(divisor), inverse_(0xFFFFFFFFu / static_cast<std::uint32_t>(divisor)) {}
  FLASH_MLA_HOST_DEVICE constexpr operator std::int32_t() const { return divisor_; }  // NOLINT

  // n / divisor, n >= 0.
  [[nodiscard]] FLASH_MLA_HOST_DEVICE std::int32_t quotient(std::int32_t n) const {
    // n / divisor - n * inverse / 2^32 is less than 1: at most one too few.
#if defined(__CUDA_ARCH__)
    const auto low = static_cast<std::int32_t>(__umulhi(static_cast<std::uint32_t>(n), inverse_));
#else
    const auto low = static_cast<std::int32_t>(
        static_cast<std::uint64_t>(static_cast<std::uint32_t>(n)) * inverse_ >> 32);
#endif
    return low + (n - low * divisor_ >= divisor_);
  }
  // Rounded towards plus infinity, of a negative n too.
  [[nodiscard]] FLASH_MLA_HOST_DEVICE std::int32_t ceil_quotient(std::int32_t n) const {
    return n > 0 ? quotient(n - 1) + 1 : -quotient(-n);
  }

 private:
  std::int32_t divisor_;
  std::uint32_t inverse_;
};

}  // namespace flash_mla
