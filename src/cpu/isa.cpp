// The choice of an instruction set at run time.
#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

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
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Linux gives the tile registers, 8 KiB of state, to processes that ask for them.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!has_avx512_bf16() || __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif
bool has_baseline() { return true; }

// Best first.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {&kAmxKernels, has_amx},                 // Intel since Sapphire Rapids
    {&kAvx512Bf16Kernels, has_avx512_bf16},  // AMD since Zen 4; Cooper Lake
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
