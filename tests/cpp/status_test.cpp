// Status, DType names and sizes, views, versions, and that the C ABI's numbers are the C++ API's.
#include <gtest/gtest.h>

#include <string>

#include "flash_mla/c_api.h"
#include "flash_mla/flash_mla.h"
#include "reference/numbers.h"

namespace flash_mla::test {
namespace {

TEST(Status, OkHasNoMessage) {
  const Status status;
  EXPECT_TRUE(status.ok());
  EXPECT_EQ(status.code(), StatusCode::kOk);
  EXPECT_STREQ(status.message(), "");
}

TEST(Status, ErrorFormatsItsMessage) {
  const Status status = Status::error(StatusCode::kUnsupported, "f: x = %d, wanted %s", 3, "4");
  EXPECT_FALSE(status.ok());
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_STREQ(status.message(), "f: x = 3, wanted 4");
}

TEST(Status, LongMessagesAreCut) {
  const std::string text(1000, 'x');
  const Status status = Status::error(StatusCode::kInternal, "%s", text.c_str());
  EXPECT_EQ(std::string(status.message()), text.substr(0, Status::kMaxMessage - 1));
}

TEST(Status, CodesHaveNames) {
  EXPECT_STREQ(status_code_name(StatusCode::kOk), "kOk");
  EXPECT_STREQ(status_code_name(StatusCode::kInvalidArgument), "kInvalidArgument");
  EXPECT_STREQ(status_code_name(StatusCode::kInvalidType), "kInvalidType");
  EXPECT_STREQ(status_code_name(StatusCode::kUnsupported), "kUnsupported");
  EXPECT_STREQ(status_code_name(StatusCode::kUnavailable), "kUnavailable");
  EXPECT_STREQ(status_code_name(StatusCode::kCudaError), "kCudaError");
  EXPECT_STREQ(status_code_name(StatusCode::kInternal), "kInternal");
  EXPECT_STREQ(status_code_name(static_cast<StatusCode>(99)), "unknown");
}

TEST(Tensor, DTypesHaveSizesAndNames) {
  const struct {
    DType dtype;
    int size;
    const char* name;
  } expected[] = {{DType::kUndefined, 0, "undefined"},
                  {DType::kBf16, 2, "bf16"},
                  {DType::kFp16, 2, "fp16"},
                  {DType::kFp32, 4, "fp32"},
                  {DType::kInt32, 4, "int32"},
                  {DType::kInt64, 8, "int64"},
                  {DType::kFp8E4M3, 1, "fp8_e4m3"},
                  {DType::kUInt8, 1, "uint8"},
                  {static_cast<DType>(-3), 0, "undefined"}};
  for (const auto& [dtype, size, name] : expected) {
    EXPECT_EQ(dtype_size(dtype), size);
    EXPECT_STREQ(dtype_name(dtype), name);
  }
}

TEST(Tensor, ContiguousView) {
  int data = 0;
  const TensorView view = contiguous_view(&data, DType::kInt32, {}, {2, 0, 5});
  EXPECT_TRUE(view.defined());
  EXPECT_EQ(view.rank, 3);
  EXPECT_EQ(view.shape[0], 2);
  EXPECT_EQ(view.stride[0], 5);
  EXPECT_EQ(view.stride[1], 5);
  EXPECT_EQ(view.stride[2], 1);
  EXPECT_EQ(contiguous_view(&data, DType::kInt32, {}, {1, 1, 1, 1, 1, 1, 1, 1}).rank, 8);
  EXPECT_FALSE(TensorView().defined());
}

TEST(Version, LibraryAndHeaderAgree) {
  EXPECT_STREQ(version(), FLASH_MLA_VERSION_STRING);
  EXPECT_STREQ(flash_mla_version(), FLASH_MLA_VERSION_STRING);
  EXPECT_EQ(flash_mla_built_with_cuda() != 0, built_with_cuda());
  EXPECT_EQ(flash_mla_cuda_device_count(), cuda_device_count());
}

TEST(CApi, NumbersAreThoseOfTheCppApi) {
  EXPECT_EQ(FLASH_MLA_INVALID_ARGUMENT, static_cast<int>(StatusCode::kInvalidArgument));
  EXPECT_EQ(FLASH_MLA_INVALID_TYPE, static_cast<int>(StatusCode::kInvalidType));
  EXPECT_EQ(FLASH_MLA_UNSUPPORTED, static_cast<int>(StatusCode::kUnsupported));
  EXPECT_EQ(FLASH_MLA_UNAVAILABLE, static_cast<int>(StatusCode::kUnavailable));
  EXPECT_EQ(FLASH_MLA_CUDA_ERROR, static_cast<int>(StatusCode::kCudaError));
  EXPECT_EQ(FLASH_MLA_INTERNAL, static_cast<int>(StatusCode::kInternal));
  EXPECT_EQ(FLASH_MLA_BF16, static_cast<int>(DType::kBf16));
  EXPECT_EQ(FLASH_MLA_FP16, static_cast<int>(DType::kFp16));
  EXPECT_EQ(FLASH_MLA_FP32, static_cast<int>(DType::kFp32));
  EXPECT_EQ(FLASH_MLA_INT32, static_cast<int>(DType::kInt32));
  EXPECT_EQ(FLASH_MLA_INT64, static_cast<int>(DType::kInt64));
  EXPECT_EQ(FLASH_MLA_FP8_E4M3, static_cast<int>(DType::kFp8E4M3));
  EXPECT_EQ(FLASH_MLA_UINT8, static_cast<int>(DType::kUInt8));
  EXPECT_EQ(FLASH_MLA_CPU, static_cast<int>(DeviceType::kCpu));
  EXPECT_EQ(FLASH_MLA_CUDA, static_cast<int>(DeviceType::kCuda));
}

// The oracle's own numbers (on a little-endian machine): every 16-bit pattern survives, and
// rounding goes to the nearest, ties to even.
TEST(Reference, SixteenBitFormats) {
  for (const auto format : {reference::Format::kBf16, reference::Format::kFp16}) {
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
      const double value = reference::load(format, &bits);
      if (std::isnan(value)) continue;
      std::uint32_t back = 0;
      reference::store(format, value, &back);
      ASSERT_EQ(back, bits);
    }
  }
  EXPECT_EQ(reference::round_to(reference::Format::kBf16, 1.0 + 0x1p-8), 1.0);
  EXPECT_EQ(reference::round_to(reference::Format::kBf16, 1.0 + 0x1.8p-7), 1.0 + 0x1p-6);
  EXPECT_EQ(reference::round_to(reference::Format::kFp16, 1.0 + 0x1.01p-11), 1.0 + 0x1p-10);
  EXPECT_EQ(reference::round_to(reference::Format::kFp16, 0x1p-25), 0.0);
}

}  // namespace
}  // namespace flash_mla::test
