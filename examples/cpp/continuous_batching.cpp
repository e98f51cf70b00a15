// Continuous batching over one paged cache, the attention part of an engine in C++: requests come
// and go, their lengths differ, and pages that one gives back serve the next. Every step decodes
// one token of each running request on the CPU, and one row is checked against attention in double
// precision. The twin of examples/python/continuous_batching.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <vector>

#include "flash_mla/flash_mla.h"

namespace {

using flash_mla::contiguous_view;
using flash_mla::DType;

constexpr int kHeads = 16, kPageSize = 64, kPages = 24, kMaxPages = 8, kMaxBatch = 8;
constexpr int kRequests = 20;
constexpr int kRow = flash_mla::kHeadDimQk, kLatent = flash_mla::kHeadDimV, kRope = kRow - kLatent;

std::uint32_t random_bits() {
  static std::uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

void fill(std::vector<float>& values) {
  for (float& value : values) value = static_cast<float>(random_bits()) / 8388608.f - 1.f;
}

struct Request {
  int cached = 0;  // tokens that have a slot
  int left = 0;    // tokens to decode
  std::vector<std::int32_t> pages;
};

// Free pages, and the rows of the cache that requests own.
class Cache {
 public:
  Cache() : rows_(std::size_t{kPages} * kPageSize * kRow) {
    for (int page = kPages - 1; page >= 0; --page) free_.push_back(page);
  }

  // Room for `tokens` more tokens: true, and their slots behind those that are in `slots` already;
  // false, and nothing has changed, when pages run out.
  bool grow(Request& request, int tokens, std::vector<std::int64_t>& slots) {
    const int pages = (request.cached + tokens + kPageSize - 1) / kPageSize;
    const int wanted = pages - static_cast<int>(request.pages.size());
    if (pages > kMaxPages || wanted > static_cast<int>(free_.size())) return false;
    for (int i = 0; i < wanted; ++i) {
      request.pages.push_back(free_.back());
      free_.pop_back();
    }
    taken_ += wanted;
    for (int token = request.cached; token < request.cached + tokens; ++token) {
      slots.push_back(std::int64_t{request.pages[token / kPageSize]} * kPageSize +
                      token % kPageSize);
    }
    request.cached += tokens;
    return true;
  }

  void give_back(Request& request) {
    free_.insert(free_.end(), request.pages.rbegin(), request.pages.rend());
    request.pages.clear();
  }

  // Writes a random latent into every slot.
  flash_mla::Status append(const std::vector<std::int64_t>& slots) {
    const auto tokens = static_cast<std::int64_t>(slots.size());
    std::vector<float> latent(slots.size() * kLatent), rope(slots.size() * kRope);
    fill(latent);
    fill(rope);
    const flash_mla::AppendKvArgs args = {
        contiguous_view(latent.data(), DType::kFp32, {}, {tokens, kLatent}),
        contiguous_view(rope.data(), DType::kFp32, {}, {tokens, kRope}), view(),
        contiguous_view(const_cast<std::int64_t*>(slots.data()), DType::kInt64, {}, {tokens})};
    return flash_mla::append_kv(args, nullptr);
  }

  flash_mla::TensorView view() {
    return contiguous_view(rows_.data(), DType::kFp32, {}, {kPages, kPageSize, 1, kRow});
  }
  const float* token(const Request& request, int token) const {
    const std::int64_t page = request.pages[token / kPageSize];
    return rows_.data() + (page * kPageSize + token % kPageSize) * kRow;
  }
  int taken() const { return taken_; }
  int free() const { return static_cast<int>(free_.size()); }

 private:
  std::vector<float> rows_;
  std::vector<std::int32_t> free_;
  int taken_ = 0;
};

// The largest error of a request's first head against attention in double precision.
double error_of(const Cache& cache, const Request& request, const float* q, const float* out) {
  std::vector<double> weights(request.cached);
  double top = -INFINITY, total = 0;
  for (int t = 0; t < request.cached; ++t) {
    double score = 0;
    for (int i = 0; i < kRow; ++i) score += double{q[i]} * cache.token(request, t)[i];
    weights[t] = score / std::sqrt(double{kRow});
    top = std::max(top, weights[t]);
  }
  for (double& weight : weights) total += weight = std::exp(weight - top);
  double worst = 0;
  for (int i = 0; i < kLatent; ++i) {
    double want = 0;
    for (int t = 0; t < request.cached; ++t) want += weights[t] * cache.token(request, t)[i];
    worst = std::max(worst, std::abs(want / total - out[i]));
  }
  return worst;
}

int failed(const flash_mla::Status& status) {
  std::fprintf(stderr, "%s\n", status.message());
  return 1;
}

}  // namespace

int main() {
  Cache cache;
  std::deque<Request> waiting;
  for (int i = 0; i < kRequests; ++i) {
    Request request;
    request.cached = -static_cast<int>(1 + random_bits() % 250);  // a prompt that is not cached yet
    request.left = static_cast<int>(5 + random_bits() % 85);
    waiting.push_back(request);
  }
  std::vector<Request> running;
  int steps = 0, waited = 0;
  double worst = 0;
  while (!waiting.empty() || !running.empty()) {
    // Admit requests while there is a row, and pages for the whole of what they will need.
    std::vector<std::int64_t> slots;
    while (!waiting.empty() && static_cast<int>(running.size()) < kMaxBatch) {
      Request request = waiting.front();
      const int prompt = -request.cached;
      int promised = 0;
      for (const Request& other : running) {
        promised += (other.cached + other.left + kPageSize - 1) / kPageSize -
                    static_cast<int>(other.pages.size());
      }
      if ((prompt + request.left + kPageSize - 1) / kPageSize > cache.free() - promised) {
        ++waited;
        break;
      }
      request.cached = 0;
      if (!cache.grow(request, prompt, slots)) return 1;
      running.push_back(request);
      waiting.pop_front();
    }
    for (Request& request : running) {
      if (!cache.grow(request, 1, slots)) return 1;  // the new token; its pages were promised
    }
    if (const auto status = cache.append(slots); !status.ok()) return failed(status);

    // One decode for all, whatever their lengths.
    const auto b = static_cast<std::int64_t>(running.size());
    std::vector<std::int32_t> table(running.size() * kMaxPages), lengths;
    for (std::size_t row = 0; row < running.size(); ++row) {
      std::copy(running[row].pages.begin(), running[row].pages.end(),
                table.begin() + static_cast<std::ptrdiff_t>(row) * kMaxPages);
      lengths.push_back(running[row].cached);
    }
    std::vector<float> q(running.size() * kHeads * kRow), out(running.size() * kHeads * kLatent);
    fill(q);
    flash_mla::DecodeArgs args;
    args.q = contiguous_view(q.data(), DType::kFp32, {}, {b, 1, kHeads, kRow});
    args.kv_cache = cache.view();
    args.block_table = contiguous_view(table.data(), DType::kInt32, {}, {b, kMaxPages});
    args.cache_seqlens = contiguous_view(lengths.data(), DType::kInt32, {}, {b});
    args.out = contiguous_view(out.data(), DType::kFp32, {}, {b, 1, kHeads, kLatent});
    args.causal = true;
    if (const auto status = flash_mla::decode(args, nullptr, {}, nullptr); !status.ok()) {
      return failed(status);
    }
    const std::size_t row = static_cast<std::size_t>(steps) % running.size();
    worst = std::max(worst, error_of(cache, running[row], q.data() + row * kHeads * kRow,
                                     out.data() + row * kHeads * kLatent));
    for (Request& request : running) {
      if (--request.left == 0) cache.give_back(request);
    }
    running.erase(std::remove_if(running.begin(), running.end(),
                                 [](const Request& request) { return request.left == 0; }),
                  running.end());
    ++steps;
  }
  std::printf("%d requests in %d steps, waited for pages in %d of them\n", kRequests, steps,
              waited);
  std::printf("%d pages taken of %d\nlargest error against double precision: %.1e\n", cache.taken(),
              kPages, worst);
  return worst < 1e-4 && cache.taken() > kPages && cache.free() == kPages ? 0 : 1;
}
