// Decode on the CPU: checks, how the work is cut, the run over threads.
//
// The query rows of a (request, kv head) are cut into groups of at most kMaxRows, the tokens that a
// group sees into chunks; one task is one chunk of one group. Who finishes a group's last chunk
// merges them, in order. The cut depends on the shapes and on the request's own length alone, so a
// result depends neither on the number of threads nor on the rest of the batch.
//
// Groups run in waves, because the partial results of all of them may not fit in memory.
#include "flash_mla/decode.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "core/schedule.h"
#include "cpu/cpu.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace flash_mla::cpu {
namespace {

constexpr std::int64_t kChunkTokens = 256;  // at least; about 100 us of one AVX2 core with 16 rows
constexpr std::int64_t kMaxChunks = 128;    // of one group
constexpr std::int64_t kWaveItems = 1024;
constexpr std::int64_t kPartialsPerThread = 16;

// Everything that will be read: lengths, and page numbers up to the length.
Status check_lengths_and_pages(const DecodeParams& params) {
  const std::int64_t most = std::int64_t{params.max_pages} * params.page_size;
  for (std::int32_t b = 0; b < params.b; ++b) {
    const std::int32_t seqlen = params.cache_seqlens[b];
    if (seqlen < 0 || seqlen > most) {
      return Status::error(
          StatusCode::kInvalidArgument,
          "decode: cache_seqlens[%d] = %d, wanted 0 .. %lld (max_pages * page_size)", b, seqlen,
          static_cast<long long>(most));
    }
    const std::int32_t* pages = params.block_table + b * params.stride_block_table_b;
    const std::int64_t num_pages = ceil_div<std::int64_t>(seqlen, params.page_size);
    for (std::int64_t i = 0; i < num_pages; ++i) {
      if (pages[i] < 0 || pages[i] >= params.num_pages) {
        return Status::error(StatusCode::kInvalidArgument,
                             "decode: block_table[%d, %lld] = %d, wanted 0 .. num_pages - 1 = %d",
                             b, static_cast<long long>(i), pages[i], params.num_pages - 1);
      }
    }
  }
  return {};
}

// How the rows of a (request, kv head) are cut into groups of nearly equal size.
struct RowCut {
  std::int64_t rows, groups, group_rows;

  explicit RowCut(const DecodeParams& params)
      : rows(std::int64_t{params.s_q} * (params.h_q / params.h_kv)),
        groups(ceil_div<std::int64_t>(rows, kMaxRows)),
        group_rows(ceil_div(rows, groups)) {}
};

// A group of rows, the tokens that it sees, and how they are cut.
struct Item {
  RowGroup group;
  std::int64_t tokens = 0;
  std::int64_t chunk_tokens = 0;
  std::int64_t chunks = 0;  // at least 1: a group that sees nothing has its empty result written
  std::int64_t first_partial = 0;  // in the wave, when there is more than one chunk
  std::int64_t first_task = 0;     // in the wave
  std::atomic<std::int64_t> chunks_left = 0;
};

void set_item(const DecodeParams& params, const RowCut& cut, std::int64_t index, Item* item) {
  const std::int64_t row_begin = index % cut.groups * cut.group_rows;
  const std::int64_t row_end = std::min(row_begin + cut.group_rows, cut.rows);
  item->group.request = static_cast<std::int32_t>(index / cut.groups / params.h_kv);
  item->group.kv_head = static_cast<std::int32_t>(index / cut.groups % params.h_kv);
  item->group.row_begin = static_cast<std::int32_t>(row_begin);
  item->group.num_rows = static_cast<std::int32_t>(row_end - row_begin);
  const std::int64_t last_s = (row_end - 1) / (params.h_q / params.h_kv);
  item->tokens = visible_tokens(params, params.cache_seqlens[item->group.request],
                                static_cast<std::int32_t>(last_s));
  const std::int64_t wanted = ceil_div(item->tokens, kMaxChunks);
  item->chunk_tokens = std::max(kChunkTokens, ceil_div(wanted, kChunkTokens) * kChunkTokens);
  item->chunks = std::max<std::int64_t>(1, ceil_div(item->tokens, item->chunk_tokens));
  item->chunks_left.store(item->chunks, std::memory_order_relaxed);
}

// What a decode allocates, all of it before the first write.
class Memory {
 public:
  Memory(std::int64_t items, std::int64_t partials, std::int64_t threads, std::size_t scratch_size)
      : items_(new (std::nothrow) Item[items]),
        partials_(new (std::nothrow) Partial[partials + threads]),
        num_partials_(partials),
        scratch_(static_cast<std::byte*>(
            ::operator new(scratch_size* threads, kAlignment, std::nothrow))),
        scratch_size_(scratch_size) {}
  ~Memory() { ::operator delete(scratch_, kAlignment); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  [[nodiscard]] bool ok() const { return items_ && partials_ && scratch_ != nullptr; }
  [[nodiscard]] Item* items() { return items_.get(); }
  [[nodiscard]] Partial* partial(std::int64_t index) { return partials_.get() + index; }
  [[nodiscard]] Partial* thread_partial(std::int32_t thread) {
    return partials_.get() + num_partials_ + thread;
  }
  [[nodiscard]] void* scratch(std::int32_t thread) { return scratch_ + thread * scratch_size_; }

 private:
  static constexpr std::align_val_t kAlignment{64};

  std::unique_ptr<Item[]> items_;
  std::unique_ptr<Partial[]> partials_;
  std::int64_t num_partials_;
  std::byte* scratch_;
  std::size_t scratch_size_;
};

// The item that task `task` belongs to.
Item& item_of_task(Item* items, std::int64_t num_items, std::int64_t task) {
  std::int64_t low = 0, high = num_items;
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (items[middle].first_task <= task ? low : high) = middle;
  }
  return items[low];
}

}  // namespace

Status decode(const DecodeParams& params) noexcept {
  if (params.b == 0 || params.s_q == 0 || params.h_q == 0) return {};
  FLASH_MLA_RETURN_IF_ERROR(check_lengths_and_pages(params));

  const Kernels& isa_kernels = kernels();
  const RowCut cut(params);
  const std::int64_t num_items = cut.groups * params.h_kv * params.b;

  // One pass to know how much there is to do, so that a small call takes little memory and few
  // threads.
  std::int64_t total_tasks = 0, total_partials = 0;
  for (std::int64_t i = 0; i < num_items; ++i) {
    Item item;
    set_item(params, cut, i, &item);
    total_tasks += item.chunks;
    if (item.chunks > 1) total_partials += item.chunks;
  }
  const auto threads =
      static_cast<std::int32_t>(std::min<std::int64_t>(total_tasks, num_threads()));
  const std::int64_t wave_items_limit = std::min(num_items, kWaveItems);
  const std::int64_t wave_partials_limit =
      std::min(total_partials, std::max(kMaxChunks, kPartialsPerThread * threads));
  Memory memory(wave_items_limit, wave_partials_limit, threads, isa_kernels.scratch_size);
  if (!memory.ok()) return Status::error(StatusCode::kInternal, "decode: out of memory");

  Item* const items = memory.items();
  for (std::int64_t next_item = 0; next_item < num_items;) {
    std::int64_t wave_items = 0, wave_tasks = 0, wave_partials = 0;
    for (; next_item < num_items && wave_items < wave_items_limit; ++next_item, ++wave_items) {
      Item& item = items[wave_items];
      set_item(params, cut, next_item, &item);
      item.first_task = wave_tasks;
      item.first_partial = wave_partials;
      const std::int64_t partials = item.chunks > 1 ? item.chunks : 0;
      if (wave_partials + partials > wave_partials_limit) break;
      wave_tasks += item.chunks;
      wave_partials += partials;
    }
    auto run_task = [&](std::int64_t task, std::int32_t thread) {
      Item& item = item_of_task(items, wave_items, task);
      const std::int64_t chunk = task - item.first_task;
      const std::int64_t begin = chunk * item.chunk_tokens;
      const std::int64_t end = std::min(begin + item.chunk_tokens, item.tokens);
      Partial* const partials =
          item.chunks > 1 ? memory.partial(item.first_partial) : memory.thread_partial(thread);
      isa_kernels.decode_chunk(params, item.group, static_cast<std::int32_t>(begin),
                               static_cast<std::int32_t>(end), memory.scratch(thread),
                               partials + chunk);
      // The last one to finish sees what the others wrote (acquire, release).
      if (item.chunks_left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        isa_kernels.finish(params, item.group, partials, static_cast<std::int32_t>(item.chunks));
      }
    };
    parallel_for(wave_tasks, threads, run_task);
  }
  return {};
}

Status plan_decode(const DecodeParams& params, const PlanParams& plan) noexcept {
  // The one part: from the first block of the first request to the last block of the last.
  std::int32_t row[kPlanRowInts] = {};
  if (params.b > 0) {
    row[2] = params.b - 1;
    row[3] = schedule_blocks(params.cache_seqlens[params.b - 1]);
  }
  for (int i = 0; i < kPlanRowInts; ++i) plan.metadata[i] = row[i];
  for (std::int32_t b = 0; b <= params.b; ++b) plan.num_splits[b] = b;
  return {};
}

}  // namespace flash_mla::cpu
