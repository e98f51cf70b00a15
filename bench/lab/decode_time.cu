// Times the decode kernel, and prints the clock traces of a kernel that probe.py built with probes.
//
//   decode_time time [CASE...]                     median of 35 graph replays, L2 cold
//   decode_time energy [CASE...]                   replays back to back for a second, at the power
//                                                  limit: time, watts and joules
//   decode_time trace CASE [CTA [EVENTS [FIRST]]]  one CTA's events in order of time
//   decode_time stats CASE                         first and last of each event, over the CTAs
//   decode_time chain CASE [CTA]                   what a page's scores and softmax take, and the
//                                                  step from there to the next page's scores
//
// CASE is b,s_q,h_q,s_kv; a v after it stands for random lengths of that mean, an s and a number
// for so many tokens at the begin that all requests share, pages and all, an n for lengths that are
// new to the kernel in every timed launch. README.md has more.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "flash_mla/flash_mla.h"
#include "probes.cuh"

extern "C" void* lab_trace_bf16_pair();
extern "C" void* lab_trace_bf16_single();

namespace {

using namespace flash_mla;
using lab::Trace;

constexpr const char* kCases[] = {
    "128,1,128,4096v", "128,1,128,8192v", "256,1,128,1024", "256,1,128,2048", "128,2,128,8192v",
    "64,4,128,4096",   "128,1,16,8192v",  "132,1,16,8192",  "66,1,128,8192",  "128,1,16,4096v",
    "256,1,16,1024",   "32,1,128,8192",   "32,1,16,8192",   "16,1,128,4096",  "16,1,16,1024",
    "8,1,128,8192",    "8,2,16,4096",     "1,1,128,1024",   "1,1,128,4096",   "1,1,128,16384",
    "1,1,128,65536",   "1,1,16,1024",     "1,1,16,4096",    "1,1,16,65536"};
constexpr int kReplays = 40, kWarmUp = 5;
constexpr double kWarmUpSeconds = 1, kSeconds = 1;
constexpr int64_t kLine = 576, kValue = 512, kPage = 64;
constexpr size_t kFlushBytes = size_t{256} << 20;

[[noreturn]] void fail(const char* what) {
  std::printf("decode_time: %s\n", what);
  std::exit(1);
}
void check(cudaError_t error) {
  if (error != cudaSuccess) fail(cudaGetErrorString(error));
}
void check(const Status& status) {
  if (!status.ok()) fail(status.message());
}

// Values from -0.175 to 0.175.
__global__ void fill(__nv_bfloat16* data, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * 256ull + threadIdx.x; i < count; i += gridDim.x * 256ull) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u + seed;
    x = (x ^ x >> 16) * 0x85ebca6b;
    x = (x ^ x >> 13) * 0xc2b2ae35;
    x ^= x >> 16;
    data[i] = __float2bfloat16(((x & 0xffff) / 65536.f - 0.5f) * 0.35f);
  }
}
__global__ void overwrite(int4* data, size_t count) {
  for (size_t i = blockIdx.x * 512ull + threadIdx.x; i < count; i += gridDim.x * 512ull) {
    data[i] = int4{1, 2, 3, static_cast<int>(i)};
  }
}
void flush_l2(cudaStream_t stream) {
  static int4* data = nullptr;
  if (data == nullptr) check(cudaMalloc(&data, kFlushBytes));
  overwrite<<<132, 512, 0, stream>>>(data, kFlushBytes / sizeof(int4));
}

struct Case {
  int b, s_q, h_q, s_kv, shared = 0;
  bool random, is_new;
  explicit Case(const char* text) {
    char v = 0;
    if (std::sscanf(text, "%d,%d,%d,%d%c", &b, &s_q, &h_q, &s_kv, &v) < 4) fail("bad case");
    random = v == 'v';
    is_new = std::strchr(text, 'n') != nullptr;
    if (const char* s = std::strchr(text, 's')) shared = std::atoi(s + 1);
  }
  void* trace() const { return s_q * h_q > 64 ? lab_trace_bf16_pair() : lab_trace_bf16_single(); }
};

// A decode call and its memory.
class Decode {
 public:
  explicit Decode(const Case& c) {
    const Device device{DeviceType::kCuda, 0};
    std::mt19937 generator(1);
    std::normal_distribution<float> length(c.s_kv, c.s_kv / 2.f);
    std::vector<int> lengths(c.b, c.s_kv);
    if (c.random) {
      for (int& x : lengths) x = std::max(static_cast<int>(length(generator)), c.s_q);
    }
    for (const int x : lengths) tokens += x;
    const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
    const int64_t max_pages = (longest + kPage - 1) / kPage, pages = c.b * max_pages;
    std::vector<int> table(pages);
    for (int i = 0; i < pages; ++i) table[i] = i;
    std::shuffle(table.begin(), table.end(), generator);
    const int64_t shared_pages = std::min<int64_t>(c.shared / kPage, max_pages);
    for (int i = 1; i < c.b; ++i) {
      std::copy_n(table.begin(), shared_pages, table.begin() + i * max_pages);
    }

    const int64_t rows = int64_t{c.b} * c.s_q * c.h_q;
    auto* q = values(rows * kLine, 1);
    auto* kv = values(pages * kPage * kLine, 2);
    args_.q = contiguous_view(q, DType::kBf16, device, {c.b, c.s_q, c.h_q, kLine});
    args_.kv_cache = contiguous_view(kv, DType::kBf16, device, {pages, kPage, 1, kLine});
    args_.block_table = contiguous_view(upload(table), DType::kInt32, device, {c.b, max_pages});
    args_.cache_seqlens = contiguous_view(upload(lengths), DType::kInt32, device, {c.b});
    args_.out = contiguous_view(allocate(rows * kValue * 2), DType::kBf16, device,
                                {c.b, c.s_q, c.h_q, kValue});
    args_.lse = contiguous_view(allocate(rows * 4), DType::kFp32, device, {c.b, c.h_q, c.s_q});
    args_.causal = true;
    check(workspace_size(args_, &workspace_.counters_size, &workspace_.partials_size));
    workspace_.counters = allocate(workspace_.counters_size);
    workspace_.partials = allocate(workspace_.partials_size);
    check(init_workspace(workspace_, device, nullptr));
    check(cudaDeviceSynchronize());
  }
  ~Decode() {
    for (void* pointer : memory_) cudaFree(pointer);
  }
  void operator()(cudaStream_t stream) { check(decode(args_, nullptr, workspace_, stream)); }
  // Overwrites what the kernel has kept of the last call, behind the partial results.
  void forget(cudaStream_t stream) const {
    const size_t bytes = std::min<size_t>(workspace_.partials_size, 1 << 18);
    check(
        cudaMemsetAsync(static_cast<char*>(workspace_.partials) + workspace_.partials_size - bytes,
                        0, bytes, stream));
  }

  double tokens = 0;

 private:
  DecodeArgs args_;
  Workspace workspace_;
  std::vector<void*> memory_;

  void* allocate(size_t bytes) {
    void* pointer = nullptr;
    check(cudaMalloc(&pointer, std::max<size_t>(bytes, 256)));
    memory_.push_back(pointer);
    return pointer;
  }
  void* upload(const std::vector<int>& data) {
    void* target = allocate(data.size() * sizeof(int));
    check(cudaMemcpy(target, data.data(), data.size() * sizeof(int), cudaMemcpyHostToDevice));
    return target;
  }
  __nv_bfloat16* values(size_t count, uint32_t seed) {
    auto* target = static_cast<__nv_bfloat16*>(allocate(count * sizeof(__nv_bfloat16)));
    fill<<<1024, 256>>>(target, count, seed);
    return target;
  }
};

// MHz of CTA 0's SM during the last launch.
double clock_rate(const void* trace) {
  Trace* const layout = nullptr;
  uint64_t x[4];  // Trace::time, Trace::clock
  static_assert(sizeof(x) == sizeof(layout->time) + sizeof(layout->clock));
  check(cudaMemcpy(x, trace, sizeof(x), cudaMemcpyDeviceToHost));
  return static_cast<double>(x[3] - x[2]) / static_cast<double>(x[1] - x[0]) * 1e3;
}

void print_rates(const Case& c, double tokens, double us) {
  const double rows = static_cast<double>(c.s_q) * c.h_q, columns = kLine + kValue;
  const double flops = 2 * rows * tokens * columns;
  const double bytes = 2 * (tokens * kLine + c.b * rows * columns);
  std::printf("b %3d s_q %d h_q %3d s_kv %6d%s %8.1f us %5.0f TFLOPS %5.0f GB/s %5.0f MHz", c.b,
              c.s_q, c.h_q, c.s_kv, c.random ? "v" : " ", us, flops / us / 1e6, bytes / us / 1e3,
              clock_rate(c.trace()));
  if (c.shared > 0) std::printf(", %d tokens shared, counted for each request", c.shared);
  if (c.is_new) std::printf(", new lengths");
}

cudaGraphExec_t capture(Decode& call, cudaStream_t stream) {
  call(stream);  // sets attributes, which a capture forbids
  check(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  call(stream);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&replay, graph, 0));
  check(cudaGraphDestroy(graph));
  return replay;
}

void time_case(const char* name, cudaStream_t stream) {
  const Case c(name);
  Decode call(c);
  const cudaGraphExec_t replay = capture(call, stream);
  cudaEvent_t begin[kReplays], end[kReplays];
  for (int i = 0; i < kReplays; ++i) {
    check(cudaEventCreate(&begin[i]));
    check(cudaEventCreate(&end[i]));
    if (c.is_new) call.forget(stream);
    flush_l2(stream);
    check(cudaEventRecord(begin[i], stream));
    check(cudaGraphLaunch(replay, stream));
    check(cudaEventRecord(end[i], stream));
  }
  check(cudaStreamSynchronize(stream));
  std::vector<float> ms;
  for (int i = 0; i < kReplays; ++i) {
    float x;
    check(cudaEventElapsedTime(&x, begin[i], end[i]));
    if (i >= kWarmUp) ms.push_back(x);
    cudaEventDestroy(begin[i]);
    cudaEventDestroy(end[i]);
  }
  cudaGraphExecDestroy(replay);
  std::sort(ms.begin(), ms.end());
  print_rates(c, call.tokens, ms[ms.size() / 2] * 1e3);
  std::printf("\n");
  std::fflush(stdout);
}

// Millijoules that the card has taken since the driver was loaded, by NVML, which is looked up: the
// toolkit need not have it.
unsigned long long millijoules() {
  using Init = int (*)();
  using GetHandle = int (*)(unsigned, void**);
  using GetEnergy = int (*)(void*, unsigned long long*);
  static void* const library = dlopen("libnvidia-ml.so.1", RTLD_NOW);
  if (library == nullptr) fail("no libnvidia-ml.so.1");
  static const auto get =
      reinterpret_cast<GetEnergy>(dlsym(library, "nvmlDeviceGetTotalEnergyConsumption"));
  static void* const device = [] {
    const auto init = reinterpret_cast<Init>(dlsym(library, "nvmlInit_v2"));
    const auto find = reinterpret_cast<GetHandle>(dlsym(library, "nvmlDeviceGetHandleByIndex_v2"));
    void* handle = nullptr;
    if (init == nullptr || find == nullptr || init() != 0 || find(0, &handle) != 0) fail("NVML");
    return handle;
  }();
  unsigned long long energy = 0;
  if (get == nullptr || get(device, &energy) != 0) fail("NVML has no energy counter");
  return energy;
}

void measure_energy(const char* name, cudaStream_t stream) {
  using Clock = std::chrono::steady_clock;
  const Case c(name);
  Decode call(c);
  const cudaGraphExec_t replay = capture(call, stream);
  const auto run = [&](double seconds) {  // number of replays
    constexpr int kBatch = 64;
    int count = 0;
    for (const auto start = Clock::now();
         Clock::now() - start < std::chrono::duration<double>(seconds);) {
      for (int i = 0; i < kBatch; ++i) check(cudaGraphLaunch(replay, stream));
      check(cudaStreamSynchronize(stream));
      count += kBatch;
    }
    return count;
  };
  run(kWarmUpSeconds);
  const unsigned long long before = millijoules();
  const auto start = Clock::now();
  const int count = run(kSeconds);
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  const double joules = static_cast<double>(millijoules() - before) / 1e3;
  cudaGraphExecDestroy(replay);
  print_rates(c, call.tokens, seconds / count * 1e6);
  std::printf(" %4.0f W %8.4f J\n", joules / seconds, joules / count);
  std::fflush(stdout);
}

// Of the third launch, L2 cold.
std::unique_ptr<Trace> take_trace(const Case& c) {
  auto trace = std::make_unique<Trace>();
  Decode call(c);
  for (int i = 0; i < 3; ++i) {
    check(cudaMemset(c.trace(), 0, sizeof(Trace)));
    flush_l2(nullptr);
    call(nullptr);
    check(cudaDeviceSynchronize());
  }
  check(cudaMemcpy(trace.get(), c.trace(), sizeof(Trace), cudaMemcpyDeviceToHost));
  if (trace->count[lab::kScores][0] == 0) fail("this kernel was built without --trace");
  return trace;
}

struct Note {
  int clock, track, event;  // clocks since the CTA's first
};
std::vector<Note> notes_of(const Trace& trace, int cta) {
  std::vector<Note> notes;
  const uint32_t start = trace.event[lab::kScores][cta][0] >> 6;
  for (int track = 0; track < lab::kTracks; ++track) {
    for (uint32_t i = 0; i < trace.count[track][cta]; ++i) {
      const uint32_t x = trace.event[track][cta][i];
      notes.push_back(
          {static_cast<int>(((x >> 6) - start) & 0x3ffffff), track, static_cast<int>(x & 63)});
    }
  }
  std::stable_sort(notes.begin(), notes.end(),
                   [](const Note& x, const Note& y) { return x.clock < y.clock; });
  return notes;
}

void print_trace(const Case& c, int cta, int events, int first) {
  const auto notes = notes_of(*take_trace(c), cta);
  std::printf("CTA %d: %zu events\n", cta, notes.size());
  for (int i = first; i < static_cast<int>(notes.size()) && i < first + events; ++i) {
    std::printf("%8d %-16s %s\n", notes[i].clock, lab::kTrackNames[notes[i].track],
                lab::kEventNames[notes[i].event]);
  }
  std::printf("last %d\n", notes.back().clock);
}

// Smallest, median and largest.
std::string spread(std::vector<int> x) {
  std::sort(x.begin(), x.end());
  char text[64];
  std::snprintf(text, sizeof(text), "%7d %7d %7d", x[0], x[x.size() / 2], x.back());
  return text;
}

void print_stats(const Case& c) {
  const auto trace = take_trace(c);
  const double clocks = clock_rate(c.trace()) / 1e3;  // of a nanosecond
  struct Times {
    std::vector<int> first, last;
  };
  std::map<std::array<int, 2>, Times> all;  // by track and event
  uint64_t start = ~0ull;
  const auto ran = [&](int cta) { return trace->count[lab::kScores][cta] > 0; };
  for (int cta = 0; cta < lab::kCtas; ++cta) {
    if (ran(cta)) start = std::min(start, trace->start[cta]);
  }
  std::vector<std::array<int, 4>> ends;
  for (int cta = 0; cta < lab::kCtas; ++cta) {
    if (!ran(cta)) continue;
    const int offset = static_cast<int>(static_cast<double>(trace->start[cta] - start) * clocks);
    std::map<std::array<int, 2>, std::array<int, 2>> here;
    int last_page = 0, pages = 0;
    for (const Note& note : notes_of(*trace, cta)) {
      const int clock = note.clock + offset;
      here.try_emplace({note.track, note.event}, std::array<int, 2>{clock, clock})
          .first->second[1] = clock;
      if (note.event != lab::kPDone) continue;
      last_page = note.clock;
      ++pages;
    }
    for (const auto& [key, times] : here) {
      all[key].first.push_back(times[0]);
      all[key].last.push_back(times[1]);
    }
    ends.push_back({last_page, cta, static_cast<int>(trace->sm[cta]), pages});
  }
  std::sort(ends.begin(), ends.end());
  std::printf("last P done, thousands of clocks after its CTA's start (CTA, SM, pages):");
  for (const auto& x : ends) std::printf(" %d(%d,%d,%d)", x[0] / 1000, x[1], x[2], x[3]);
  std::printf("\nclocks after the first CTA's start, least / median / most of the CTAs:\n");
  std::vector<std::pair<int, std::array<int, 2>>> order;
  for (auto& [key, times] : all) {
    std::sort(times.first.begin(), times.first.end());
    order.push_back({times.first[times.first.size() / 2], key});
  }
  std::sort(order.begin(), order.end());
  for (const auto& [median, key] : order) {
    const Times& times = all[key];
    std::printf("%-16s %-16s first %s   last %s  (%zu)\n", lab::kTrackNames[key[0]],
                lab::kEventNames[key[1]], spread(times.first).c_str(), spread(times.last).c_str(),
                times.first.size());
  }
}

// Of the score warpgroup's pages; best of a kernel that notes nothing else (probe.py --chain).
void print_chain(const Case& c, int cta) {
  enum { kSoftmax, kStep, kScores, kPage, kSpans };
  constexpr const char* kNames[kSpans] = {"softmax", "step", "scores", "page"};
  std::vector<int> spans[kSpans];
  int done = 0, written = 0, issued = 0;  // of the page: S there, P done, and the next one's issue
  for (const Note& note : notes_of(*take_trace(c), cta)) {
    if (note.track != lab::kScores) continue;
    if (note.event == lab::kS) {
      if (issued > done) spans[kScores].push_back(note.clock - issued);
      if (done > 0) spans[kPage].push_back(note.clock - done);
      done = note.clock;
    } else if (note.event == lab::kPDone) {
      spans[kSoftmax].push_back(note.clock - done);
      written = note.clock;
    } else if (note.event == lab::kIssue) {
      if (written > done) spans[kStep].push_back(note.clock - written);
      issued = note.clock;
    }
  }
  std::printf("CTA %d: least, median, most clocks:", cta);
  for (int i = 0; i < kSpans; ++i) {
    if (!spans[i].empty()) std::printf("  %s %s", kNames[i], spread(spans[i]).c_str());
  }
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  const auto number = [&](int i, int other) { return argc > i ? std::atoi(argv[i]) : other; };
  if (mode == "time" || mode == "energy") {
    cudaStream_t stream;
    check(cudaStreamCreate(&stream));
    std::vector<const char*> cases(argv + 2, argv + argc);
    if (cases.empty()) cases.assign(std::begin(kCases), std::end(kCases));
    for (const char* name : cases) {
      mode == "time" ? time_case(name, stream) : measure_energy(name, stream);
    }
  } else if (mode == "trace" && argc > 2) {
    print_trace(Case(argv[2]), number(3, 0), number(4, 60), number(5, 0));
  } else if (mode == "stats" && argc > 2) {
    print_stats(Case(argv[2]));
  } else if (mode == "chain" && argc > 2) {
    print_chain(Case(argv[2]), number(3, 0));
  } else {
    fail(
        "time [CASE...] | energy [CASE...] | trace CASE [CTA [EVENTS [FIRST]]] | stats CASE | "
        "chain CASE [CTA]");
  }
}
