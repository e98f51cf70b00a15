// Decode on the CPU: checks, how the work is cut, the run over threads.
//
// The query rows of a (request, kv head) are cut into groups of at most Kernels::max_rows, the
// tokens that a group sees into chunks; one task is one chunk of one group. When all chunks are
// done they are merged, in order, a few rows a task. The cut depends on the shapes and on the
// request's own length alone, so a result depends neither on the number of threads nor on the rest
// of the batch.
//
// Groups run in waves, because the partial results of all of them may not fit in memory.
#include "flash_mla/decode.h"

#include <algorithm>
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

constexpr std::int64_t kMaxChunks = 128;  // of one group
constexpr std::int64_t kWaveItems = 1024;
constexpr std::int64_t kPartialsPerThread = 16;
constexpr std::int32_t kMergeRows = 8;  // of a task of the merge

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

// How the rows of a (request, kv head) are cut into groups of nearly equal size, and the tokens
// that a group sees into chunks.
struct Cut {
  std::int64_t rows, groups, group_rows;
  std::int64_t chunk_tokens;  // at least

  Cut(const DecodeParams& params, const Kernels& isa_kernels)
      : rows(std::int64_t{params.s_q} * (params.h_q / params.h_kv)),
        groups(ceil_div<std::int64_t>(rows, isa_kernels.max_rows)),
        group_rows(ceil_div(rows, groups)),
        chunk_tokens(isa_kernels.chunk_tokens) {}
};

// A group of rows, the tokens that it sees, and how they are cut.
struct Item {
  RowGroup group;
  std::int64_t tokens = 0;
  std::int64_t chunk_tokens = 0;
  std::int64_t chunks = 0;  // at least 1: a group that sees nothing has its empty result written
  std::int64_t first_partial = 0;  // in the wave, when there is more than one chunk
  std::int64_t first_task = 0;     // in the wave
};

void set_item(const DecodeParams& params, const Cut& cut, std::int64_t index, Item* item) {
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
  item->chunk_tokens =
      std::max<std::int64_t>(1, ceil_div(wanted, cut.chunk_tokens)) * cut.chunk_tokens;
  item->chunks = std::max<std::int64_t>(1, ceil_div(item->tokens, item->chunk_tokens));
}

// Memory for an array of structures of `size` bytes, 64-byte aligned; null when there is none.
class AlignedArray {
 public:
  AlignedArray(std::int64_t count, std::size_t size)
      : data_(static_cast<std::byte*>(::operator new(count* size, kAlignment, std::nothrow))),
        size_(size) {}
  ~AlignedArray() { ::operator delete(data_, kAlignment); }
  AlignedArray(const AlignedArray&) = delete;
  AlignedArray& operator=(const AlignedArray&) = delete;

  [[nodiscard]] std::byte* operator[](std::int64_t index) { return data_ + index * size_; }

 private:
  static constexpr std::align_val_t kAlignment{64};

  std::byte* data_;
  std::size_t size_;
};

// What a decode allocates, all of it before the first write.
class Memory {
 public:
  Memory(std::int64_t items, std::int64_t partials, std::int64_t group_rows, std::int64_t threads,
         std::size_t scratch_size)
      : items_(new (std::nothrow) Item[items]),
        partial_rows_(ceil_div<std::int64_t>(group_rows, kPartialRowMultiple) *
                      kPartialRowMultiple),
        num_partials_(partials),
        partials_(partials + threads, partial_rows_ * (2 + kHeadDimV) * sizeof(float)),
        scratch_(threads, scratch_size) {}

  [[nodiscard]] bool ok() { return items_ && partials_[0] != nullptr && scratch_[0] != nullptr; }
  [[nodiscard]] Item* items() { return items_.get(); }
  [[nodiscard]] Partial partial(std::int64_t index) {
    auto* const memory = reinterpret_cast<float*>(partials_[index]);
    return {memory, memory + partial_rows_, memory + 2 * partial_rows_};
  }
  [[nodiscard]] Partial thread_partial(std::int32_t thread) {
    return partial(num_partials_ + thread);
  }
  [[nodiscard]] void* scratch(std::int32_t thread) { return scratch_[thread]; }

 private:
  std::unique_ptr<Item[]> items_;
  std::int64_t partial_rows_;
  std::int64_t num_partials_;
  AlignedArray partials_;
  AlignedArray scratch_;
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
  const Cut cut(params, isa_kernels);
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
  Memory memory(wave_items_limit, wave_partials_limit, cut.group_rows, threads,
                isa_kernels.scratch_size);
  if (!memory.ok()) return Status::error(StatusCode::kInternal, "decode: out of memory");

  const std::int64_t merges_of_item = ceil_div<std::int64_t>(cut.group_rows, kMergeRows);
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
    auto run_chunk = [&](std::int64_t task, std::int32_t thread) {
      const Item& item = item_of_task(items, wave_items, task);
      const std::int64_t chunk = task - item.first_task;
      const std::int64_t begin = chunk * item.chunk_tokens;
      const std::int64_t end = std::min(begin + item.chunk_tokens, item.tokens);
      const bool whole = item.chunks == 1;
      const Partial partial =
          whole ? memory.thread_partial(thread) : memory.partial(item.first_partial + chunk);
      isa_kernels.decode_chunk(params, item.group, static_cast<std::int32_t>(begin),
                               static_cast<std::int32_t>(end), memory.scratch(thread), partial);
      if (whole) isa_kernels.finish(params, item.group, &partial, 1, 0, item.group.num_rows);
    };
    parallel_for(wave_tasks, threads, run_chunk);
    if (wave_partials == 0) continue;

    auto merge_rows = [&](std::int64_t task, std::int32_t) {
      const Item& item = items[task / merges_of_item];
      const auto row = static_cast<std::int32_t>(task % merges_of_item * kMergeRows);
      const std::int32_t row_end = std::min(row + kMergeRows, item.group.num_rows);
      if (item.chunks == 1 || row >= row_end) return;
      Partial partials[kMaxChunks];
      for (std::int64_t i = 0; i < item.chunks; ++i) {
        partials[i] = memory.partial(item.first_partial + i);
      }
      isa_kernels.finish(params, item.group, partials, static_cast<std::int32_t>(item.chunks), row,
                         row_end);
    };
    parallel_for(wave_items * merges_of_item, threads, merge_rows);
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
