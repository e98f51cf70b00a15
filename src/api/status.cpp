// Status: code names and the formatting of messages.
#include "flash_mla/status.h"

#include <cstdarg>
#include <cstdio>

namespace flash_mla {

const char* status_code_name(StatusCode code) noexcept {
  switch (code) {
    case StatusCode::kOk:
      return "kOk";
    case StatusCode::kInvalidArgument:
      return "kInvalidArgument";
    case StatusCode::kInvalidType:
      return "kInvalidType";
    case StatusCode::kUnsupported:
      return "kUnsupported";
    case StatusCode::kUnavailable:
      return "kUnavailable";
    case StatusCode::kCudaError:
      return "kCudaError";
    case StatusCode::kInternal:
      return "kInternal";
  }
  return "unknown";
}

Status Status::error(StatusCode code, const char* format, ...) noexcept {
  Status status;
  status.code_ = code;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(status.message_, sizeof(status.message_), format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace flash_mla
