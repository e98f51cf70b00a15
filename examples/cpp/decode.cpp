// Decodes one step of three requests on the CPU: append the new tokens to a paged cache, then
// attend over it.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "flash_mla/flash_mla.h"

namespace {

using flash_mla::contiguous_view;
using flash_mla::DType;

constexpr int kRequests = 3, kHeads = 16, kPageSize = 64, kPagesPerRequest = 4;
constexpr int kPages = kRequests * kPagesPerRequest;
constexpr int kLatent = flash_mla::kHeadDimV, kRope = flash_mla::kHeadDimQk - kLatent;

// Numbers that look random, from -1 to 1.
std::vector<float> numbers(std::size_t count) {
  static std::uint32_t state = 1;
  std::vector<float> values(count);
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(state >> 8) / 8388608.f - 1.f;
  }
  return values;
}

int failed(const flash_mla::Status& status) {
  std::fprintf(stderr, "%s\n", status.message());
  return 1;
}

}  // namespace

int main() {
  const flash_mla::Device cpu;
  std::vector<float> kv_cache(kPages * kPageSize * flash_mla::kHeadDimQk);
  std::vector<std::int32_t> block_table(kPages);
  std::vector<std::int32_t> lengths = {200, 64, 7};
  for (int page = 0; page < kPages; ++page) block_table[page] = kPages - 1 - page;
  const auto kv_view = contiguous_view(kv_cache.data(), DType::kFp32, cpu,
                                       {kPages, kPageSize, 1, flash_mla::kHeadDimQk});

  // Every token of every request goes to slot page * page_size + offset.
  std::vector<std::int64_t> slots;
  for (int request = 0; request < kRequests; ++request) {
    for (int token = 0; token < lengths[request]; ++token) {
      const int page = block_table[request * kPagesPerRequest + token / kPageSize];
      slots.push_back(std::int64_t{page} * kPageSize + token % kPageSize);
    }
  }
  const auto tokens = static_cast<std::int64_t>(slots.size());
  std::vector<float> latent = numbers(tokens * kLatent), rope = numbers(tokens * kRope);
  const flash_mla::AppendKvArgs append = {
      contiguous_view(latent.data(), DType::kFp32, cpu, {tokens, kLatent}),
      contiguous_view(rope.data(), DType::kFp32, cpu, {tokens, kRope}), kv_view,
      contiguous_view(slots.data(), DType::kInt64, cpu, {tokens})};
  if (const auto status = flash_mla::append_kv(append, nullptr); !status.ok()) {
    return failed(status);
  }

  std::vector<float> q = numbers(kRequests * kHeads * flash_mla::kHeadDimQk);
  std::vector<float> out(kRequests * kHeads * kLatent), lse(kRequests * kHeads);
  flash_mla::DecodeArgs args;
  args.q =
      contiguous_view(q.data(), DType::kFp32, cpu, {kRequests, 1, kHeads, flash_mla::kHeadDimQk});
  args.kv_cache = kv_view;
  args.block_table =
      contiguous_view(block_table.data(), DType::kInt32, cpu, {kRequests, kPagesPerRequest});
  args.cache_seqlens = contiguous_view(lengths.data(), DType::kInt32, cpu, {kRequests});
  args.out = contiguous_view(out.data(), DType::kFp32, cpu, {kRequests, 1, kHeads, kLatent});
  args.lse = contiguous_view(lse.data(), DType::kFp32, cpu, {kRequests, kHeads, 1});
  if (const auto status = flash_mla::decode(args, nullptr, {}, nullptr); !status.ok()) {
    return failed(status);
  }

  char backend[96];
  if (const auto status = flash_mla::describe_decode(args, backend, sizeof(backend));
      !status.ok()) {
    return failed(status);
  }
  std::printf("flash_mla %s, %s\n", flash_mla::version(), backend);
  for (int request = 0; request < kRequests; ++request) {
    const int row = request * kHeads;
    std::printf("request %d: %3d tokens, head 0: lse %.4f, out[0] %+.4f\n", request,
                lengths[request], lse[row], out[row * kLatent]);
    if (!std::isfinite(lse[row])) return 1;
  }
  return 0;
}
