// The CPU backend's entry points. Arguments are validated by src/api; what only the data says
// (lengths, page numbers, slots) is checked here, before anything is written.
#pragma once

#include <cstdint>

#include "core/params.h"
#include "flash_mla/status.h"

namespace flash_mla::cpu {

Status decode(const DecodeParams& params) noexcept;
// The plan of the CPU: one part, no splits.
Status plan_decode(const DecodeParams& params, const PlanParams& plan) noexcept;
Status append_kv(const AppendKvParams& params) noexcept;
Status merge_states(const MergeStatesParams& params) noexcept;

const char* isa() noexcept;
std::int32_t num_threads() noexcept;
void set_num_threads(std::int32_t num_threads) noexcept;  // num_threads >= 1

}  // namespace flash_mla::cpu
