// append_kv and merge_states test cases, for the CPU and for the GPU: each makes its tensors, has
// the library work on them where `place` puts them, and reports as GoogleTest failures what differs
// from the reference.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "flash_mla/cache.h"
#include "flash_mla/merge.h"
#include "place.h"

namespace flash_mla::test {

struct AppendCase {
  DType dtype = DType::kBf16;
  int page_size = 64;
  int num_pages = 3;
  bool strided = false;
  bool with_head_axis = false;
  std::vector<std::int64_t> slots;
};

// Cases for both backends.
std::vector<AppendCase> append_cases();
void check_append(const AppendCase& append_case, Place& place, StreamHandle stream,
                  const std::function<void()>& synchronize);

struct MergeCase {
  DType dtype = DType::kBf16;
  DType out_dtype = DType::kBf16;
  int parts = 2, b = 1, s_q = 1, h_q = 1, d = 512;
  bool strided = false;
  bool in_place = false;  // out is outs[0], lse is lses[0]
  EmptyLse empty_lse = EmptyLse::kPositiveInfinity;
};

std::vector<MergeCase> merge_cases();
void check_merge(const MergeCase& merge_case, Place& place, StreamHandle stream,
                 const std::function<void()>& synchronize);

// Each case in a place of its own.
template <typename AnyPlace, typename Case>
void check_each(const std::vector<Case>& cases,
                void (*check)(const Case&, Place&, StreamHandle, const std::function<void()>&),
                StreamHandle stream, const std::function<void()>& synchronize) {
  for (std::size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(i);
    AnyPlace place;
    check(cases[i], place, stream, synchronize);
  }
}

}  // namespace flash_mla::test
