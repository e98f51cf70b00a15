// The result of every call: a code and a message. No call throws, prints, exits or aborts.
#pragma once

#include <cstdint>

namespace flash_mla {

// The values are part of the C ABI (c_api.h) and never change.
enum class StatusCode : std::int32_t {
  kOk = 0,
  kInvalidArgument =
      1,  // a shape, stride, alignment, range, device or size is wrong (Python: ValueError)
  kInvalidType = 2,  // a dtype is not one the function takes (Python: TypeError)
  kUnsupported =
      3,  // well formed, but not available in this build yet (Python: NotImplementedError)
  kUnavailable = 4,  // no backend can run it here: no CUDA in the build, not a Hopper GPU (Python:
                     // RuntimeError)
  kCudaError = 5,    // the CUDA runtime or driver reported an error (Python: RuntimeError)
  kInternal = 6,     // a defect of this library; please report it (Python: RuntimeError)
};

// Name of a code: "kInvalidArgument". Never null.
[[nodiscard]] const char* status_code_name(StatusCode code) noexcept;

// Code and message, self-contained (no heap), cheap to return. The message of an error reads
// `function: argument = got, wanted; hint`, at most kMaxMessage - 1 bytes; it is empty when ok.
class [[nodiscard]] Status {
 public:
  static constexpr int kMaxMessage = 320;

  constexpr Status() noexcept = default;

  // An error. printf-style; the text is truncated to kMaxMessage - 1 bytes. `code` must not be kOk.
  [[gnu::format(printf, 2, 3)]] static Status error(StatusCode code, const char* format,
                                                    ...) noexcept;

  [[nodiscard]] constexpr bool ok() const noexcept { return code_ == StatusCode::kOk; }
  [[nodiscard]] constexpr StatusCode code() const noexcept { return code_; }
  [[nodiscard]] constexpr const char* message() const noexcept { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  char message_[kMaxMessage] = {};
};

}  // namespace flash_mla

// Returns from the enclosing function when `expression` is not ok.
#define FLASH_MLA_RETURN_IF_ERROR(expression)                                      \
  do {                                                                             \
    if (::flash_mla::Status status_ = (expression); !status_.ok()) return status_; \
  } while (false)
