// DType: sizes and names.
#include "flash_mla/tensor.h"

namespace flash_mla {

int dtype_size(DType dtype) noexcept {
  switch (dtype) {
    case DType::kUndefined:
      return 0;
    case DType::kFp8E4M3:
    case DType::kUInt8:
      return 1;
    case DType::kBf16:
    case DType::kFp16:
      return 2;
    case DType::kFp32:
    case DType::kInt32:
      return 4;
    case DType::kInt64:
      return 8;
  }
  return 0;
}

const char* dtype_name(DType dtype) noexcept {
  switch (dtype) {
    case DType::kUndefined:
      return "undefined";
    case DType::kBf16:
      return "bf16";
    case DType::kFp16:
      return "fp16";
    case DType::kFp32:
      return "fp32";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kFp8E4M3:
      return "fp8_e4m3";
    case DType::kUInt8:
      return "uint8";
  }
  return "undefined";
}

}  // namespace flash_mla
