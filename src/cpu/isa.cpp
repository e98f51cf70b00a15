// The choice of an instruction set at run time.
#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#include "cpu/cpu.h"

namespace flash_mla::cpu {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*runs_here)();
};

#if defined(__x86_64__)
// __builtin_cpu_supports() also knows whether the operating system saves the registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
bool has_baseline() { return true; }

// Best first.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {&kAvx512Kernels, has_avx512},
    {&kAvx2Kernels, has_avx2},
#endif
    {&kBaselineKernels, has_baseline},
};

// A name that no candidate has asks for nothing.
const Kernels* choose() {
  const char* asked = std::getenv("FLASH_MLA_CPU_ISA");
  const Kernels* best = nullptr;
  for (const Candidate& candidate : kCandidates) {
    if (!candidate.runs_here()) continue;
    if (best == nullptr) best = candidate.kernels;
    if (asked != nullptr && std::strcmp(asked, candidate.kernels->name) == 0)
      return candidate.kernels;
  }
  return best;
}

}  // namespace

const Kernels& kernels() noexcept {
  static const Kernels* const chosen = choose();
  return *chosen;
}

const char* isa() noexcept { return kernels().name; }

}  // namespace flash_mla::cpu
