// What tests of argument checks share: a check is a change to valid arguments, and the code and
// text that the function has to answer with.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <ostream>
#include <string>

#include "flash_mla/flash_mla.h"

namespace flash_mla::test {

inline constexpr Device kCpu = {DeviceType::kCpu, 0};
inline constexpr Device kCuda = {DeviceType::kCuda, 0};
inline constexpr std::int64_t kHuge = std::int64_t{1} << 60;

// Points at nothing that is ever looked at.
inline void* address(std::uintptr_t value) { return reinterpret_cast<void*>(value); }

// One change to valid arguments, and what the function has to say to it.
template <typename Args>
struct Check {
  const char* name;
  std::function<void(Args&)> change;
  StatusCode code;
  const char* message;
};

template <typename Args>
std::ostream& operator<<(std::ostream& stream, const Check<Args>& check) {
  return stream << check.name;
}

template <typename Args>
std::string check_name(const testing::TestParamInfo<Check<Args>>& info) {
  return info.param.name;
}

inline void expect_status(const Status& status, StatusCode code, const std::string& message) {
  EXPECT_STREQ(status_code_name(status.code()), status_code_name(code));
  EXPECT_EQ(std::string(status.message()), message);
}

inline constexpr StatusCode kArgument = StatusCode::kInvalidArgument;
inline constexpr StatusCode kType = StatusCode::kInvalidType;
inline constexpr StatusCode kUnsupported = StatusCode::kUnsupported;

// How the refusal of a CUDA tensor goes on in a build without the CUDA backend.
inline constexpr const char* kNoBackend =
    ".device = cuda:0, but this build has no CUDA backend; rebuild with nvcc or pass CPU tensors";

}  // namespace flash_mla::test
