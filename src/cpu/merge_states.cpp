// Merging partial attention results on the CPU.
#include <cstdint>

#include "cpu/cpu.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace flash_mla::cpu {

Status merge_states(const MergeStatesParams& params) noexcept {
  constexpr std::int64_t kRowsPerTask = 64;
  const std::int64_t rows = std::int64_t{params.b} * params.s_q * params.h_q;
  const Kernels& isa_kernels = kernels();
  auto run_task = [&](std::int64_t task, std::int32_t) {
    const std::int64_t begin = task * kRowsPerTask;
    const std::int64_t end = rows - begin < kRowsPerTask ? rows : begin + kRowsPerTask;
    for (std::int64_t row = begin; row < end; ++row) isa_kernels.merge_row(params, row);
  };
  parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, num_threads(), run_task);
  return {};
}

}  // namespace flash_mla::cpu
