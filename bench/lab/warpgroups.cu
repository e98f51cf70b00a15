// Micro-benchmarks of what stands beside the products: barriers between warpgroups, code that is
// fetched for the first time, and a softmax while other warpgroups' products run.
//
//   warpgroups [ping-pong | cold | softmax]...      default: all
//
// README.md says what each answers.
#include "micro.cuh"

namespace flash_mla::lab {
namespace {

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

constexpr Part kParts[] = {
    {"ping-pong", run_ping_pong}, {"cold", run_cold}, {"softmax", run_softmax<>}};

}  // namespace
}  // namespace flash_mla::lab

int main(int argc, char** argv) { flash_mla::lab::run_parts(flash_mla::lab::kParts, argc, argv); }
