// What the micro-benchmarks have in common: clocks, operands in shared memory, and the host's side.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace flash_mla::lab {

using namespace flash_mla::cuda::ptx;
namespace ptx = ::cuda::ptx;
using Mma = Wgmma<__nv_bfloat16>;

constexpr int kTile = 64 * 64 * 2;  // bytes
constexpr int kPage = 9 * kTile;    // of 64 tokens; also of Q
constexpr int kSharedBytes = 3 * kPage;
constexpr int kSms = 132;

__device__ float sink[1024];  // where results go, so that they are computed

__device__ __forceinline__ uint32_t clock_now() {
  uint32_t clock;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(clock)::"memory");
  return clock;
}
template <int kCount>
__device__ __forceinline__ void clear(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = 0.f;
}
template <int kCount>
__device__ __forceinline__ void use(const float (&x)[kCount]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += x[i];
  sink[threadIdx.x] += sum;
}
// A fragment of which the compiler knows nothing.
__device__ __forceinline__ void make(uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i] = threadIdx.x * i;
    asm volatile("" : "+r"(a[i]));
  }
}
// The same fragment for each product.
__device__ __forceinline__ auto same(const uint32_t (&a)[4]) {
  return [&a](int, int) -> const uint32_t(&)[4] { return a; };
}
// One thread of each warp arrives.
__device__ __forceinline__ void warp_arrives(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
}

// Q, a page as the scores read it, and the `part`th half of a page as the output reads it.
struct Operands {
  SmemDescriptor q, k, v;
  __device__ __forceinline__ explicit Operands(const uint8_t* raw, int part = 0)
      : q(shared_address(raw), 16, 1024),
        k(shared_address(raw) + kPage, 16, 1024),
        v(shared_address(raw) + kPage + part * 4 * kTile, kTile, 1024) {}
};

// The scores of a page, 36 products: tiles kFirst to kLast - 1 of Q from registers, of which
// fragment(tile, k) is a reference.
template <int kFirst, int kLast, typename Fragment>
__device__ __forceinline__ void issue_scores(float (&s)[32], const Operands& at,
                                             const Fragment& fragment, bool anew = false) {
#pragma unroll
  for (int i = 0; i < 36; ++i) {
    const int tile = i / 4, k = i % 4, offset = tile * kTile + k * 32;
    if (tile >= kFirst && tile < kLast) {
      Mma::n64_rs(s, fragment(tile, k), at.k.at(offset), !anew || i != 0);
    } else {
      Mma::n64_ss(s, at.q.at(offset), at.k.at(offset), !anew || i != 0);
    }
  }
}

// --- Host ----------------------------------------------------------------------------------------

constexpr int kResults = 8 * kSms;

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(error));
  std::exit(1);
}

// What the kernel left in `result`.
template <typename... Parameters, typename... Arguments>
std::vector<uint32_t> run(void (*kernel)(uint32_t*, Parameters...), int ctas, int threads,
                          int bytes, Arguments... arguments) {
  static uint32_t* result = nullptr;
  if (result == nullptr) check(cudaMalloc(&result, kResults * sizeof(uint32_t)));
  check(cudaMemset(result, 0, kResults * sizeof(uint32_t)));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<ctas, threads, bytes>>>(result, arguments...);
  check(cudaGetLastError());
  std::vector<uint32_t> values(kResults);
  check(cudaMemcpy(values.data(), result, kResults * sizeof(uint32_t), cudaMemcpyDeviceToHost));
  return values;
}

struct Part {
  const char* name;
  void (*run)();
};
// Runs the parts that the command line names, or all.
template <int kCount>
void run_parts(const Part (&parts)[kCount], int argc, char** argv) {
  for (const Part& part : parts) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted |= std::strcmp(argv[i], part.name) == 0;
    if (wanted) part.run();
  }
}

}  // namespace flash_mla::lab
