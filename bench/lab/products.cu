// Micro-benchmarks of wgmma products: how far they may be issued ahead, whom the tensor cores
// serve, what each costs, and what a page costs in three orders.
//
//   products [depth | arbitrate | steady | rates]...      default: all
//
// README.md says what each answers. Operands are whatever shared memory holds; only clocks count.
#include "micro.cuh"

namespace flash_mla::lab {
namespace {

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

constexpr Part kParts[] = {{"depth", run_depth},
                           {"arbitrate", run_arbitrate},
                           {"steady", run_steady},
                           {"rates", run_rates}};

}  // namespace
}  // namespace flash_mla::lab

int main(int argc, char** argv) { flash_mla::lab::run_parts(flash_mla::lab::kParts, argc, argv); }
