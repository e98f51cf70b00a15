// Writing new tokens into the paged cache on the CPU: row copies.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/cpu.h"
#include "flash_mla/decode.h"

namespace flash_mla::cpu {

// On one thread: a decode step appends a few rows of 1152 bytes, and "the later of two equal slots
// wins" needs an order.
Status append_kv(const AppendKvParams& params) noexcept {
  const std::int64_t slots = params.num_pages * params.page_size;
  for (std::int64_t i = 0; i < params.t; ++i) {
    if (params.slot_mapping[i] >= slots) {
      return Status::error(StatusCode::kInvalidArgument,
                           "append_kv: slot_mapping[%lld] = %lld, wanted < %lld (num_pages * "
                           "page_size), or negative to skip",
                           static_cast<long long>(i),
                           static_cast<long long>(params.slot_mapping[i]),
                           static_cast<long long>(slots));
    }
  }
  const std::int64_t element = dtype_size(params.dtype);
  const auto* kv_c = static_cast<const std::byte*>(params.kv_c);
  const auto* k_pe = static_cast<const std::byte*>(params.k_pe);
  auto* cache = static_cast<std::byte*>(params.kv_cache);
  for (std::int64_t i = 0; i < params.t; ++i) {
    const std::int64_t slot = params.slot_mapping[i];
    if (slot < 0) continue;
    std::byte* row = cache + element * (slot / params.page_size * params.stride_kv_page +
                                        slot % params.page_size * params.stride_kv_row);
    std::memcpy(row, kv_c + element * i * params.stride_kv_c_t, element * kHeadDimV);
    std::memcpy(row + element * kHeadDimV, k_pe + element * i * params.stride_k_pe_t,
                element * (kHeadDimQk - kHeadDimV));
  }
  return {};
}

}  // namespace flash_mla::cpu
