// Micro-benchmarks of what the dense decode kernel is made of: wgmma products, the order in which
// warpgroups get the tensor cores, barriers, cold code, and a softmax under products.
//
//   products [depth | arbitrate | steady | ping-pong | cold | rates | softmax]...      default: all
//
// README.md says what each answers. Operands are whatever shared memory holds; only clocks count.
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

namespace {

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

// Products that the kernel does not use: d += A B, B MN-major, both from shared memory.
// clang-format off
#define LAB_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LAB_16(d, i) LAB_4(d, i), LAB_4(d, i + 4), LAB_4(d, i + 8), LAB_4(d, i + 12)
#define LAB_64(d, i) LAB_16(d, i), LAB_16(d, i + 16), LAB_16(d, i + 32), LAB_16(d, i + 48)
#define LAB_PLACES \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, " \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define LAB_MORE_PLACES \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, " \
  "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, " \
  "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
__device__ __forceinline__ void n128_ss(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile("{ .reg .pred p; setp.eq.b32 p, 0, 0; "
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LAB_PLACES "}, "
               "%64, %65, p, 1, 1, 0, 1; }"
               : LAB_64(d, 0) : "l"(a), "l"(b));
}
__device__ __forceinline__ void n256_ss(float (&d)[128], uint64_t a, uint64_t b) {
  asm volatile("{ .reg .pred p; setp.eq.b32 p, 0, 0; "
               "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" LAB_PLACES LAB_MORE_PLACES
               "}, %128, %129, p, 1, 1, 0, 1; }"
               : LAB_64(d, 0), LAB_64(d, 64) : "l"(a), "l"(b));
}
// clang-format on

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
// Half of the output of a page, P from shared memory, four products.
__device__ __forceinline__ void issue_output(float (&o)[128], const Operands& at) {
#pragma unroll
  for (int k = 0; k < 4; ++k) n256_ss(o, at.q.at(k * 32), at.v.at(k * 2048));
}

// Issues products into d and e; notes the clocks until all are issued and until all are done.
template <int kD, int kE, typename Issue>
__device__ __forceinline__ void timed(uint32_t* result, uint32_t begin, float (&d)[kD],
                                      float (&e)[kE], const Issue& issue) {
  wgmma_fence();
  issue();
  wgmma_commit();
  const uint32_t issued = clock_now() - begin;
  wgmma_wait<0>();
  pin(d);
  pin(e);
  if (threadIdx.x % 128 == 0) {
    result[0] = issued;
    result[1] = clock_now() - begin;
  }
}

// How far a warpgroup may issue ahead.
enum class Form { kScoresShared, kScoresRegisters, kOutput, kBoth };
template <Form kForm>
__global__ void __launch_bounds__(128, 1) depth(uint32_t* result) {
  extern __shared__ __align__(1024) uint8_t raw[];
  const Operands at(raw);
  uint32_t a[4];
  make(a);
  float s[kForm == Form::kOutput ? 1 : 32], o[kForm >= Form::kOutput ? 128 : 1];
  clear(s);
  clear(o);
#pragma unroll 1
  for (int repeat = 0; repeat < 3; ++repeat) {
    timed(result, clock_now(), s, o, [&] {
      if constexpr (kForm == Form::kScoresRegisters) issue_scores<0, 9>(s, at, same(a));
      if constexpr (kForm == Form::kScoresShared || kForm == Form::kBoth) {
        issue_scores<9, 9>(s, at, same(a));
      }
      if constexpr (kForm >= Form::kOutput) issue_output(o, at);
    });
  }
  use(s);
  use(o);
}

// Whom the tensor cores serve: warpgroup 0 issues scores, 1 and 2 an output each, so many clocks
// after the start.
template <bool kRegisters>
__global__ void __launch_bounds__(384, 1)
    arbitrate(uint32_t* result, uint32_t scores_delay, uint32_t output_delay) {
  extern __shared__ __align__(1024) uint8_t raw[];
  const int warpgroup = threadIdx.x / 128;
  const Operands at(raw, warpgroup);
  uint32_t a[4];
  make(a);
  float none[1] = {};
#pragma unroll 1
  for (int repeat = 0; repeat < 3; ++repeat) {
    __syncthreads();
    const uint32_t begin = clock_now();
    const auto wait_until = [begin](uint32_t clocks) {
      while (clock_now() - begin < clocks) {
      }
    };
    if (warpgroup == 0) {
      float s[32];
      clear(s);
      pin(s);
      wait_until(scores_delay);
      timed(result, begin, s, none, [&] { issue_scores<kRegisters ? 5 : 9, 9>(s, at, same(a)); });
      use(s);
    } else {
      float o[128];
      clear(o);
      pin(o);
      wait_until(output_delay);
      timed(result + 2 * warpgroup, begin, o, none, [&] { issue_output(o, at); });
      use(o);
    }
  }
}

// A page in the steady state, a schedule each: warpgroup 0 does scores and a softmax of so many
// steps, 1 and 2 the output when they are told.
enum Schedule {
  kTwoScores,   // S twice: the next scores are issued before the softmax
  kAtOnce,      // S once: the output is told when the softmax is done
  kAfterScores  // S once: the output is told when the next scores are issued
};
template <Schedule kSchedule>
__global__ void __launch_bounds__(384, 1) steady(uint32_t* result, int steps, int pages) {
  extern __shared__ __align__(1024) uint8_t raw[];
  __shared__ uint64_t full[4], empty[4];
  if (threadIdx.x < 4) {
    ptx::mbarrier_init(&full[threadIdx.x], 4);
    ptx::mbarrier_init(&empty[threadIdx.x], 8);
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  const Operands at(raw, warpgroup % 2);
  const uint32_t begin = clock_now();
  if (warpgroup == 0) {
    float s[32], before[32];
    uint32_t a[4][4][4];
    clear(s);
    for (int i = 0; i < 16; ++i) make(a[i / 4][i % 4]);
    const auto scores = [&] {
      wgmma_fence();
      issue_scores<0, 4>(
          s, at, [&](int tile, int k) -> const uint32_t(&)[4] { return a[tile % 4][k]; }, true);
      wgmma_commit();
    };
    const auto softmax = [&](float(&x)[32]) {
      pin(x);
      float m = 0.f;
#pragma unroll
      for (int i = 0; i < 32; ++i) m += x[i];
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
#pragma unroll
        for (int i = 0; i < 8; ++i) m = m * 1.5f + 1.f;
      }
      raw[kSharedBytes - 4096 + threadIdx.x] = m > 1e30f;
    };
    const auto tell = [&](int page) {
      fence_proxy_async();
      warp_arrives(&full[page % 4]);
    };
    const auto keep = [&] {
#pragma unroll
      for (int i = 0; i < 32; ++i) before[i] = s[i];
    };
    if constexpr (kSchedule == kTwoScores) {
      scores();
      wgmma_wait<0>();
      pin(s);
      keep();
    }
#pragma unroll 1
    for (int page = 0; page < pages; ++page) {
      mbarrier_wait(&empty[(page + 1) % 4], ((page + 1) / 4 & 1) ^ 1);
      scores();
      if constexpr (kSchedule == kTwoScores) {
        softmax(before);
        tell(page);
        wgmma_wait<0>();
        pin(s);
        keep();
        continue;
      }
      if (kSchedule == kAfterScores && page > 0) tell(page - 1);
      wgmma_wait<0>();
      softmax(s);
      if (kSchedule == kAtOnce) tell(page);
    }
    if (kSchedule == kAfterScores) tell(pages - 1);
    use(s);
  } else {
    float o[128];
    clear(o);
#pragma unroll 1
    for (int page = 0; page < pages; ++page) {
      mbarrier_wait(&full[page % 4], page / 4 & 1);
      wgmma_fence();
      issue_output(o, at);
      wgmma_commit();
      wgmma_wait<0>();
      pin(o);
      warp_arrives(&empty[page % 4]);
    }
    use(o);
  }
  __syncthreads();
  if (threadIdx.x == 0) result[blockIdx.x] = clock_now() - begin;
}

// Two warpgroups wait for each other: over mbarriers, with so many arrivals, or (0) bar.sync.
template <int kArrivals>
__global__ void __launch_bounds__(256, 1) ping_pong(uint32_t* result, int rounds) {
  __shared__ uint64_t barrier[2];
  if (kArrivals > 0 && threadIdx.x < 2) ptx::mbarrier_init(&barrier[threadIdx.x], kArrivals);
  __syncthreads();
  const auto arrive = [&](int i) {
    if constexpr (kArrivals == 128) {
      ptx::mbarrier_arrive(&barrier[i]);
    } else {
      warp_arrives(&barrier[i]);
    }
  };
  const uint32_t begin = clock_now();
  for (int i = 0; i < rounds; ++i) {
    if constexpr (kArrivals == 0) {
      named_barrier_sync(1, 256);
      named_barrier_sync(2, 256);
    } else if (threadIdx.x < 128) {
      arrive(0);
      mbarrier_wait(&barrier[1], i & 1);
    } else {
      mbarrier_wait(&barrier[0], i & 1);
      arrive(1);
    }
  }
  if (threadIdx.x == 0) result[0] = clock_now() - begin;
}

// Straight code, 2,048 instructions and more, that no other warpgroup shares.
template <int kSalt>
__device__ __noinline__ float straight(float x) {
  float a = x, b = x + 1, c = x + 2, d = x + 3;
#pragma unroll
  for (int i = 0; i < 512; ++i) {
    a = a * b + static_cast<float>(i + kSalt);
    b = b * c + 1.5f;
    c = c * d + static_cast<float>(2 * i + kSalt);
    d = d * a + 2.5f;
  }
  return a + b + c + d;
}
__global__ void __launch_bounds__(512, 1) cold(uint32_t* result, int warpgroups, float x) {
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup >= warpgroups) return;
#pragma unroll 1
  for (int repeat = 0; repeat < 2; ++repeat) {
    const uint32_t begin = clock_now();
    asm volatile("" : "+f"(x));  // keeps the call between the clocks
    const float y = warpgroup == 0   ? straight<0>(x)
                    : warpgroup == 1 ? straight<1000>(x)
                    : warpgroup == 2 ? straight<2000>(x)
                                     : straight<3000>(x);
    asm volatile("" ::"f"(y));
    const uint32_t end = clock_now();
    sink[threadIdx.x] = y;
    if (threadIdx.x % 128 == 0) result[blockIdx.x * 8 + repeat * 4 + warpgroup] = end - begin;
  }
}
__global__ void overwrite(int4* data, size_t count) {
  for (size_t i = blockIdx.x * 512ull + threadIdx.x; i < count; i += gridDim.x * 512ull) {
    data[i] = int4{1, 2, 3, static_cast<int>(i)};
  }
}

// What one product takes, by one warpgroup alone or by two at once. n128 alternates between two
// accumulators, as the kernel does, unless the name says otherwise. More products from registers
// than these ptxas serialises: it counts A's registers anew for each (C7511, nvcc 13.0).
enum Product { kNone, kN64Ss, kN64Rs, kN128Ss, kN128Rs, kN128RsOne };
constexpr const char* kNames[] = {"-",       "n64 SS",  "n64 RS",
                                  "n128 SS", "n128 RS", "n128 RS one accumulator"};
constexpr int products(Product product) {
  return product == kNone ? 0 : product <= kN64Rs ? 32 : 16;
}

template <Product kProduct>
__device__ __forceinline__ void rate_of(uint32_t* result, const uint8_t* raw) {
  const Operands at(raw + threadIdx.x / 128 * 4 * kTile);
  uint32_t a[4];
  make(a);
  float s[kProduct <= kN64Rs ? 32 : 64], o[kProduct == kN128Ss || kProduct == kN128Rs ? 64 : 1];
  clear(s);
  clear(o);
#pragma unroll 1
  for (int repeat = 0; repeat < 3; ++repeat) {
    __syncthreads();
    timed(result + threadIdx.x / 128 * 2, clock_now(), s, o, [&] {
#pragma unroll
      for (int i = 0; i < products(kProduct); ++i) {
        const int n64 = i / 4 % 4 * kTile + i % 4 * 32;
        const uint64_t q = at.q.at(i / 2 % 4 * 32);
        const uint64_t v = at.v.at(i / 2 % 4 * 2048 + i % 2 * 2 * kTile);
        if constexpr (kProduct == kN64Ss) Mma::n64_ss(s, at.q.at(n64), at.k.at(n64), true);
        if constexpr (kProduct == kN64Rs) Mma::n64_rs(s, a, at.k.at(n64), true);
        if constexpr (kProduct == kN128Ss) n128_ss(i % 2 == 0 ? s : o, q, v);
        if constexpr (kProduct == kN128Rs) Mma::n128_rs(i % 2 == 0 ? s : o, a, v, true);
        if constexpr (kProduct == kN128RsOne) Mma::n128_rs(s, a, v, true);
      }
    });
  }
  use(s);
  use(o);
}
template <Product kFirst, Product kSecond>
__global__ void __launch_bounds__(kSecond == kNone ? 128 : 256, 1) rate(uint32_t* result) {
  extern __shared__ __align__(1024) uint8_t raw[];
  if (kSecond == kNone || threadIdx.x < 128) {
    rate_of<kFirst>(result, raw);
  } else {
    rate_of<kSecond>(result, raw);
  }
}

// What slows the softmax: warpgroup 0 loops over a piece of it, the others over products.
enum Piece { kWhole, kFfma, kExp2, kPack, kFadd, kShuffle, kStore, kMax, kPieces };
constexpr const char* kPieceNames[kPieces] = {"exp2, sum, pack, store",
                                              "128 FFMA",
                                              "32 MUFU.EX2",
                                              "64 F2FP",
                                              "128 FADD",
                                              "16 SHFL",
                                              "16 STSM",
                                              "128 FMNMX"};
enum Under { kAlone, kOutput, kScores, kTwoOutputs, kUnders };
constexpr const char* kUnderNames[] = {"alone", "under 8 x n128 RS", "under 36 x n64 SS",
                                       "under the same of two"};
constexpr int softmax_threads(int under) { return under == kTwoOutputs ? 384 : 256; }
// With three warpgroups a thread has 168 registers: two accumulators would be serialised (C7512).
constexpr int accumulators(int under) { return under == kTwoOutputs ? 1 : 2; }
constexpr int kLoops = 64;

template <Piece kPiece>
__device__ __forceinline__ void piece(float (&s)[32], float& sum, uint32_t target, float x) {
  uint32_t p[16] = {};
#pragma unroll
  for (int i = 0; i < 32; i += 2) {
    if constexpr (kPiece == kWhole) {
      const float low = exp2_approx(fmaf(s[i], x, -0.5f));
      const float high = exp2_approx(fmaf(s[i + 1], x, -0.5f));
      sum += low + high;
      asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(p[i / 2]) : "f"(high), "f"(low));
    }
  }
#pragma unroll
  for (int k = 0; k < (kPiece == kWhole ? 4 : kPiece == kStore ? 16 : 0); ++k) {
    const int j = k % 4 * 4;
    store_matrices(target + k % 4 * 32, {p[j], p[j + 1], p[j + 2], p[j + 3]});
  }
  // Every result is used in the end: ptxas drops what is not, volatile or not.
#define LAB_REPEAT(kind, count, text)                   \
  if constexpr (kPiece == kind) {                       \
    _Pragma("unroll") for (int i = 0; i < count; ++i) { \
      asm volatile(text : "+f"(s[i % 32]) : "f"(x));    \
    }                                                   \
  }
  LAB_REPEAT(kFfma, 128, "fma.rn.f32 %0, %0, %1, %1;")
  LAB_REPEAT(kExp2, 32, "ex2.approx.ftz.f32 %0, %0;")
  LAB_REPEAT(kPack, 64, "{ .reg .b32 y; cvt.rn.bf16x2.f32 y, %0, %1; mov.b32 %0, y; }")
  LAB_REPEAT(kFadd, 128, "add.f32 %0, %0, %1;")
  LAB_REPEAT(kShuffle, 16, "shfl.sync.bfly.b32 %0, %0, 1, 31, -1;")
  LAB_REPEAT(kMax, 128, "max.f32 %0, %0, %1;")
#undef LAB_REPEAT
}

// Whether it holds for any thread of the warpgroup: its warps must leave a loop of products
// together.
__device__ __forceinline__ bool any_of_warpgroup(bool x) {
  int any;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.b32 p, %1, 0; barrier.cta.red.or.pred q, %2, 128, p;"
      " selp.b32 %0, 1, 0, q; }"
      : "=r"(any)
      : "r"(static_cast<int>(x)), "r"(1 + threadIdx.x / 128)
      : "memory");
  return any;
}

template <Piece kPiece, Under kUnder>
__global__ void __launch_bounds__(softmax_threads(kUnder), 1)
    softmax_under(uint32_t* result, float scale) {
  extern __shared__ __align__(1024) uint8_t raw[];
  __shared__ volatile int stop;
  if (threadIdx.x == 0) stop = 0;
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  const uint32_t begin = clock_now();
  uint32_t loops = 0;
  if (warpgroup == 0) {
    float s[32], sum = 0.f;
#pragma unroll
    for (int i = 0; i < 32; ++i) s[i] = threadIdx.x * 0.001f * i;
    const uint32_t target = shared_address(raw) + 25 * kTile + threadIdx.x / 32 * 2048 +
                            threadIdx.x % 16 * 128 + threadIdx.x % 32 / 16 * 16;
#pragma unroll 1
    for (; loops < kLoops; ++loops) {
      pin(s);
      piece<kPiece>(s, sum, target, scale);
    }
    if (threadIdx.x == 0) result[0] = (clock_now() - begin) / kLoops;
    use(s);
    sink[threadIdx.x] += sum;
    any_of_warpgroup(false);
    if (threadIdx.x == 0) stop = 1;
    return;
  }
  if (kUnder == kAlone) return;
  const Operands at(raw, warpgroup - 1);
  float s[32], o[accumulators(kUnder)][64];
  uint32_t p[4][4];
  clear(s);
  for (auto& x : o) clear(x);
  for (auto& fragment : p) make(fragment);
  bool more;
#pragma unroll 1
  do {
    wgmma_fence();
    if constexpr (kUnder == kScores) {
      issue_scores<9, 9>(s, at, same(p[0]));
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        Mma::n128_rs(o[i % accumulators(kUnder)], p[i / 2],
                     at.v.at(i / 2 * 2048 + i % 2 * 2 * kTile), true);
      }
    }
    wgmma_commit();
    more = !any_of_warpgroup(stop);  // meanwhile
    wgmma_wait<0>();
    if constexpr (kUnder == kScores) {
      pin(s);
    } else {
      for (auto& x : o) pin(x);
    }
    ++loops;
  } while (more);
  if (threadIdx.x % 128 == 0) result[warpgroup] = (clock_now() - begin) / loops;
  use(s);
  for (auto& x : o) use(x);
}

// --- Host ----------------------------------------------------------------------------------------

constexpr int kResults = 8 * kSms;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("products: %s\n", cudaGetErrorString(error));
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

void run_depth() {
  const auto print = [](auto kernel, const char* name) {
    const auto x = run(kernel, 1, 128, kSharedBytes);
    std::printf("depth, %s: issued after %u clocks, done after %u\n", name, x[0], x[1]);
  };
  print(depth<Form::kScoresShared>, "36 n64 SS");
  print(depth<Form::kScoresRegisters>, "36 n64 RS");
  print(depth<Form::kOutput>, "4 n256 SS");
  print(depth<Form::kBoth>, "36 n64 SS, 4 n256 SS");
}

void run_arbitrate() {
  constexpr uint32_t kDelays[][2] = {{0, 0}, {0, 100}, {0, 300}, {0, 600}, {200, 0}, {600, 0}};
  const auto print = [&](auto kernel, const char* name) {
    for (const auto& [scores, output] : kDelays) {
      const auto x = run(kernel, 1, 384, kSharedBytes, scores, output);
      std::printf("arbitrate, scores (%s) after %u, outputs after %u:", name, scores, output);
      for (int i = 0; i < 6; i += 2) std::printf(" | issued %u, done %u", x[i], x[i + 1]);
      std::printf("\n");
    }
  };
  print(arbitrate<false>, "36 SS");
  print(arbitrate<true>, "20 SS, 16 RS");
}

void run_steady() {
  constexpr int kPages = 200;
  const auto print = [](auto kernel, const char* name) {
    for (const int steps : {0, 8, 16, 24}) {
      run(kernel, kSms, 384, kSharedBytes, steps, kPages);
      const auto x = run(kernel, kSms, 384, kSharedBytes, steps, kPages);
      std::printf("steady, %s, softmax %d: %.0f clocks a page\n", name, steps,
                  static_cast<double>(x[5]) / kPages);
    }
  };
  print(steady<kTwoScores>, "two S");
  print(steady<kAtOnce>, "one S, output at once");
  print(steady<kAfterScores>, "one S, output after the next scores");
}

void run_ping_pong() {
  constexpr int kRounds = 1000;
  const auto print = [](auto kernel, const char* name) {
    const double clocks = run(kernel, 1, 256, 0, kRounds)[0];
    std::printf("ping-pong, %s: %.0f clocks a round trip\n", name, clocks / kRounds);
  };
  print(ping_pong<4>, "mbarrier, 4 arrivals");
  print(ping_pong<128>, "mbarrier, 128 arrivals");
  print(ping_pong<0>, "bar.sync twice");
}

void run_cold() {
  constexpr size_t kBytes = size_t{256} << 20;
  int4* data;
  check(cudaMalloc(&data, kBytes));
  for (int warpgroups = 1; warpgroups <= 4; ++warpgroups) {
    for (const int ctas : {1, kSms}) {
      overwrite<<<kSms, 512>>>(data, kBytes / sizeof(int4));
      const auto x = run(cold, ctas, 512, 0, warpgroups, 0.5f);
      std::printf("2048 instructions, %d warpgroups, %3d CTAs: cold", warpgroups, ctas);
      for (int i = 0; i < warpgroups; ++i) std::printf(" %u", x[i]);
      std::printf(" | warm");
      for (int i = 0; i < warpgroups; ++i) std::printf(" %u", x[4 + i]);
      std::printf("\n");
    }
  }
  check(cudaFree(data));
}

template <Product kFirst, Product kSecond = kNone>
void print_rate() {
  constexpr int kWarpgroups = kSecond == kNone ? 1 : 2;
  const auto x = run(rate<kFirst, kSecond>, 1, 128 * kWarpgroups, kSharedBytes);
  // Some 60 clocks are those of an empty measurement; 1,024 a warpgroup is the nominal rate.
  std::printf("rates, %d %s | %d %s: %u | %u clocks, %.2f of nominal time\n", products(kFirst),
              kNames[kFirst], products(kSecond), kNames[kSecond], x[1], x[3],
              (std::max(x[1], x[3]) - 60.0) / (1024 * kWarpgroups));
}
void run_rates() {
  print_rate<kN64Ss>();
  print_rate<kN64Rs>();
  print_rate<kN128Ss>();
  print_rate<kN128Rs>();
  print_rate<kN128RsOne>();
  print_rate<kN64Ss, kN64Ss>();
  print_rate<kN64Rs, kN64Rs>();
  print_rate<kN128Ss, kN128Ss>();
  print_rate<kN128Rs, kN128Rs>();
  print_rate<kN64Ss, kN128Rs>();
  print_rate<kN64Ss, kN128RsOne>();
  print_rate<kN64Rs, kN128Rs>();
}

template <int kPiece = 0, int kUnder = 0>
void run_softmax() {
  const auto kernel = softmax_under<static_cast<Piece>(kPiece), static_cast<Under>(kUnder)>;
  const auto x = run(kernel, kSms, softmax_threads(kUnder), kSharedBytes, 0.3f);
  std::printf("softmax %-22s %-25s %5u clocks; products %u %u clocks a loop\n", kPieceNames[kPiece],
              kUnderNames[kUnder], x[0], x[1], x[2]);
  if constexpr (kUnder + 1 < kUnders) {
    run_softmax<kPiece, kUnder + 1>();
  } else if constexpr (kPiece + 1 < kPieces) {
    run_softmax<kPiece + 1>();
  }
}

}  // namespace

int main(int argc, char** argv) {
  const struct {
    const char* name;
    void (*run)();
  } kParts[] = {{"depth", run_depth},         {"arbitrate", run_arbitrate}, {"steady", run_steady},
                {"ping-pong", run_ping_pong}, {"cold", run_cold},           {"rates", run_rates},
                {"softmax", run_softmax<>}};
  for (const auto& part : kParts) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted |= std::strcmp(argv[i], part.name) == 0;
    if (wanted) part.run();
  }
}
