// What a CTA found out about its part at the last call, kept for the next one.
//
// The layers of a model, and the replays of a graph, decode with the same lengths one after the
// other, and finding the first work item takes a short decode an eighth of its time. So each CTA
// writes its First behind the partial results, with the lengths that it follows from, and next time
// compares those with the lengths as they are.
//
// Nothing is trusted: that memory may hold anything before a call. Lengths are compared one by one;
// that the rest is what this CTA wrote, with those lengths, for a call that differs in nothing
// else, two sums of 32 bits say, into which go the call's memo_key, the CTA, and every word at its
// place.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/sm90/decode_dense/work.cuh"

namespace flash_mla::cuda::decode_dense {

struct alignas(16) Memo {
  int32_t seqlens[kMemoRequests];  // of that call's requests
  uint32_t first[30];              // the CTA's First, then 0
  uint32_t sum[2];                 // MemoSum
};
inline constexpr int kMemoWords = sizeof(Memo::first) / 4;
static_assert(sizeof(Memo) == kMemoBytes && sizeof(First) % 4 == 0);
static_assert(sizeof(First) <= sizeof(Memo::first) && std::is_trivially_copyable_v<First>);

// Lengths of up to 4 x 32 requests, of which lane i of a warp holds those of i, i + 32, ...; 0 past
// the last one.
struct Lengths {
  static constexpr int kRows = 4, kCount = 32 * kRows;
  int32_t at[kRows];
  // `load(i)` gives the length of request i.
  template <typename Load>
  __device__ __forceinline__ Lengths(int begin, int end, const Load& load) {
    for_each(begin, end, [&](int row, int i, bool exists) { at[row] = exists ? load(i) : 0; });
  }
  template <typename Body>
  __device__ __forceinline__ static void for_each(int begin, int end, const Body& body) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int i = begin + row * 32 + static_cast<int>(threadIdx.x % 32);
      body(row, i, i < end);
    }
  }
};

// Two sums of the lengths, the words of a First at their places, the CTA, and what else a First
// follows from; a warp makes them.
class MemoSum {
 public:
  __device__ __forceinline__ void add(const Lengths& lengths) {
#pragma unroll
    for (const int32_t length : lengths.at) {
      lengths_.x = lengths_.x * 0x01000193 + length;
      lengths_.y = lengths_.y * 0x2c9277b5 + length;
    }
  }
  // `word`: the lane's of Memo::first.
  __device__ __forceinline__ uint2 with(uint64_t key, uint32_t word) const {
    const uint32_t place = (threadIdx.x % 32 + 1) * 0x9e3779b9 + ptx::cta_index() * 0x7feb352d;
    const uint32_t x = mixed(mixed(static_cast<uint32_t>(key) ^ place ^ lengths_.x) + word);
    const uint32_t y = mixed(mixed(static_cast<uint32_t>(key >> 32) + place + word) ^ lengths_.y);
    return {__reduce_add_sync(~0u, x), __reduce_add_sync(~0u, y)};
  }

 private:
  uint2 lengths_ = {0, 0};
  // The last steps of MurmurHash3, by Austin Appleby.
  __device__ __forceinline__ static uint32_t mixed(uint32_t x) {
    x = (x ^ x >> 16) * 0x85ebca6b;
    x = (x ^ x >> 13) * 0xc2b2ae35;
    return x ^ x >> 16;
  }
};

// What this CTA has kept, by a warp: asked for when it is made, looked at later.
class Recollection {
 public:
  First first;

  __device__ __forceinline__ explicit Recollection(const KernelParams& params)
      : params_(params), lengths_(lengths(0)), old_lengths_(old_lengths(0)) {
    const Memo& memo = params.memos[ptx::cta_index()];
    if (!remembers(params)) return;
    word_ = __ldcg(memo.first + threadIdx.x % 32);  // the last two lanes': the sums
    uint4 words[(sizeof(First) + 15) / 16];
#pragma unroll
    for (uint32_t i = 0; i < sizeof(words) / 16; ++i) {
      words[i] = __ldcg(reinterpret_cast<const uint4*>(memo.first) + i);
    }
    std::memcpy(&first, words, sizeof(First));
  }

  // Length of request `lane`, 0 where there is none. Of at most kFewRequests.
  __device__ __forceinline__ int32_t seqlen() const { return lengths_.at[0]; }

  // Whether `first` is of this CTA, a call like this one, and these lengths. Called once.
  __device__ __forceinline__ bool holds() {
    if (!remembers(params_)) return false;
    MemoSum sum;
    bool same = true;
#pragma unroll 1
    for (int begin = 0;;) {
      sum.add(old_lengths_);
#pragma unroll
      for (int row = 0; row < Lengths::kRows; ++row) {
        same = same && lengths_.at[row] == old_lengths_.at[row];
      }
      begin += Lengths::kCount;
      if (begin >= params_.decode.b) break;
      lengths_ = lengths(begin);
      old_lengths_ = old_lengths(begin);
    }
    const int lane = threadIdx.x % 32;
    const uint2 sums = sum.with(params_.memo_key, lane < kMemoWords ? word_ : 0);
    same = same && (lane != kMemoWords || word_ == sums.x) &&
           (lane != kMemoWords + 1 || word_ == sums.y);
    return __all_sync(~0u, same);
  }

  // Writes down what was found instead, when no warp of the CTA looks any more. The lengths are
  // read again: they must not change during a call.
  __device__ __forceinline__ static void write(const KernelParams& params, const First& first) {
    if (!remembers(params)) return;
    Memo& memo = params.memos[ptx::cta_index()];
    MemoSum sum;
#pragma unroll 1
    for (int begin = 0; begin < params.decode.b; begin += Lengths::kCount) {
      const Lengths lengths = lengths_of(params, begin);
      sum.add(lengths);
      Lengths::for_each(begin, params.decode.b, [&](int row, int i, bool exists) {
        if (exists) memo.seqlens[i] = lengths.at[row];
      });
    }
    const int lane = threadIdx.x % 32;
    uint32_t word = lane < static_cast<int>(sizeof(First) / 4)
                        ? reinterpret_cast<const uint32_t*>(&first)[lane]
                        : 0;
    const uint2 sums = sum.with(params.memo_key, word);
    if (lane >= kMemoWords) word = lane == kMemoWords ? sums.x : sums.y;
    memo.first[lane] = word;  // the last two lanes': the sums
  }

 private:
  const KernelParams& params_;
  Lengths lengths_, old_lengths_;
  uint32_t word_;

  __device__ __forceinline__ static bool remembers(const KernelParams& params) {
    return params.decode.b <= kMemoRequests;
  }
  __device__ __forceinline__ static Lengths lengths_of(const KernelParams& params, int begin) {
    return {begin, params.decode.b, [&](int i) { return __ldg(params.decode.cache_seqlens + i); }};
  }
  __device__ __forceinline__ Lengths lengths(int begin) const { return lengths_of(params_, begin); }
  __device__ __forceinline__ Lengths old_lengths(int begin) const {
    return {begin, remembers(params_) ? params_.decode.b : 0,
            [&](int i) { return __ldcg(params_.memos[ptx::cta_index()].seqlens + i); }};
  }
};

}  // namespace flash_mla::cuda::decode_dense
