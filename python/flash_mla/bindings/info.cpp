// What Python asks about the build and the machine, through ctypes: operators are for tensors.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <iterator>

#include "flash_mla/flash_mla.h"

namespace {

struct Field {
  char* text;
  std::int32_t size;

  void set(const char* value) const {
    if (size > 0) std::snprintf(text, static_cast<std::size_t>(size), "%s", value);
  }
};

}  // namespace

#define FLASH_MLA_EXPORT extern "C" __attribute__((visibility("default")))

FLASH_MLA_EXPORT const char* flash_mla_python_version() { return flash_mla::version(); }
FLASH_MLA_EXPORT std::int32_t flash_mla_python_cuda_build_version() {
  return flash_mla::cuda_build_version();
}
FLASH_MLA_EXPORT const char* flash_mla_python_cpu_isa() { return flash_mla::cpu_isa(); }
FLASH_MLA_EXPORT std::int32_t flash_mla_python_cpu_num_threads() {
  return flash_mla::cpu_num_threads();
}
FLASH_MLA_EXPORT std::int32_t flash_mla_python_cuda_device_count() {
  return flash_mla::cuda_device_count();
}

// Fills `numbers` with {major, minor, SMs, bytes of memory, driver version, supported} and the two
// texts. Returns a StatusCode, and on an error its message in `why_not`.
FLASH_MLA_EXPORT std::int32_t flash_mla_python_cuda_device_info(std::int32_t device,
                                                                std::int64_t* numbers, char* name,
                                                                char* why_not,
                                                                std::int32_t text_size) {
  flash_mla::CudaDeviceInfo info;
  const flash_mla::Status status = flash_mla::cuda_device_info(device, &info);
  if (!status.ok()) {
    Field{why_not, text_size}.set(status.message());
    return static_cast<std::int32_t>(status.code());
  }
  const std::int64_t values[] = {info.compute_capability_major,
                                 info.compute_capability_minor,
                                 info.num_sms,
                                 info.memory,
                                 info.driver_version,
                                 info.supported};
  std::copy(std::begin(values), std::end(values), numbers);
  Field{name, text_size}.set(info.name);
  Field{why_not, text_size}.set(info.why_not);
  return 0;
}

// Rows of a plan for these shapes on a device (-1: the CPU), or minus the StatusCode with its
// message in `error`.
FLASH_MLA_EXPORT std::int32_t flash_mla_python_plan_size(std::int32_t cuda_device, std::int64_t s_q,
                                                         std::int64_t h_q, std::int64_t h_kv,
                                                         std::int64_t page_size, char* error,
                                                         std::int32_t error_size) {
  flash_mla::Device device;
  if (cuda_device >= 0) device = {flash_mla::DeviceType::kCuda, cuda_device};
  flash_mla::DecodeArgs args;
  args.q = flash_mla::contiguous_view(nullptr, flash_mla::DType::kBf16, device,
                                      {0, s_q, h_q, flash_mla::kHeadDimQk});
  args.kv_cache = flash_mla::contiguous_view(nullptr, flash_mla::DType::kBf16, device,
                                             {0, page_size, h_kv, flash_mla::kHeadDimQk});
  std::int32_t num_parts = 0;
  const flash_mla::Status status = flash_mla::plan_size(args, &num_parts);
  if (status.ok()) return num_parts;
  Field{error, error_size}.set(status.message());
  return -static_cast<std::int32_t>(status.code());
}
