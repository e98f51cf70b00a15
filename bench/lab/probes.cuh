// Clock probes: what probe.py puts into a copy of the decode kernel, and decode_time.cu reads.
#pragma once

#include <cstdint>

namespace flash_mla::lab {

inline constexpr int kCtas = 132, kEvents = 2048;

// Who notes an event. Each track is written by one thread of a CTA.
enum Track { kLeft, kRight, kScores, kPages, kItems = kPages + 3, kTracks };
inline constexpr const char* kTrackNames[] = {
    "O0", "   O1", "      S", "         LR", "         LL", "         LP", "            W"};

// clang-format off
enum Event {
  kStart, kFound, kBarriers, kFirstItem, kPlanned, kRoles,                                            // the CTA
  kItem, kP, kGo, kPvIssued, kPvDone, kItemDone, kStored, kItemOut, kAllItems,  // output warpgroups
  kLast, kPieces, kWeights, kTileDone, kMerged,                          // the same, merging
  kWaitQ, kQ, kIssue, kS, kSoftmax, kMaxima, kPDone,                     // score warpgroup
  kLoad, kLoaded, kItemTold,                                             // producers
  kRightLanded, kRopeLanded, kLeftLanded, kNumEvents                     // score warpgroup, waiting
};
inline constexpr const char* kEventNames[] = {
  "start", "start found", "barriers made", "first item", "planned", "roles",
  "item", "P there", "PV may start", "PV issued", "PV done", "item done", "partial stored", "item out", "all items",
  "was last", "all pieces there", "weights", "tile done", "merged",
  "wait for Q", "Q there", "issue S", "S there", "softmax", "maxima", "P done",
  "load", "loaded", "item told",
  "right landed", "rope landed", "left landed"};
// clang-format on
static_assert(sizeof(kEventNames) / sizeof(char*) == kNumEvents && kNumEvents <= 1 << 6);

// What one launch left behind.
struct Trace {
  uint64_t time[2], clock[2];      // CTA 0's begin and end: nanoseconds and its SM's clocks
  uint64_t start[kCtas];           // nanoseconds
  uint32_t sm[kCtas];              // where the CTA ran
  uint32_t count[kTracks][kCtas];  // events, kEvents at most
  uint32_t event[kTracks][kCtas][kEvents];  // clock << 6 | Event
};

#ifdef FLASH_MLA_LAB_KERNEL
static __device__ Trace trace;  // one for each instantiation of the kernel

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

// At the kernel's begin (0) and end (1), by all threads.
__device__ __forceinline__ void note_clock(int end) {
  if (threadIdx.x != 0 || blockIdx.x != 0) return;
  trace.time[end] = nanoseconds();
  trace.clock[end] = clock64();
}

// Shared has a member uint16_t lab_count[kTracks]. For the tracks of whole warpgroups their first
// thread writes; of the others the caller lets in one thread.
template <typename Shared>
__device__ __forceinline__ void probe(int track, uint32_t event) {
  if (track < kPages && threadIdx.x % 128 != 0) return;
  uint32_t clock;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(clock)::"memory");
  extern __shared__ __align__(1024) uint8_t raw[];
  uint16_t& count = reinterpret_cast<Shared*>(raw)->lab_count[track];
  if (count == kEvents) return;
  trace.event[track][blockIdx.x][count] = clock << 6 | event;
  trace.count[track][blockIdx.x] = ++count;
}

// Before any other probe, by all threads.
template <typename Shared>
__device__ __forceinline__ void begin_probes(Shared& shared) {
  if (threadIdx.x == kScores * 128) {
    for (uint16_t& count : shared.lab_count) count = 0;
    probe<Shared>(kScores, kStart);
    trace.start[blockIdx.x] = nanoseconds();
    asm volatile("mov.u32 %0, %%smid;" : "=r"(trace.sm[blockIdx.x]));
  }
  __syncthreads();
}

// The address, on the device, of the trace of this file's kernel.
#define FLASH_MLA_LAB_READER(name)                         \
  extern "C" void* lab_trace_##name() {                    \
    void* address = nullptr;                               \
    cudaGetSymbolAddress(&address, flash_mla::lab::trace); \
    return address;                                        \
  }
#endif

}  // namespace flash_mla::lab
