// Decode test cases: the named list, the tensors of a case with poison wherever the library must
// not look, and the comparison with the reference. Used for the CPU and for the GPU.
#pragma once

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "flash_mla/decode.h"
#include "place.h"
#include "reference/decode.h"
#include "test_tensor.h"

namespace flash_mla::test {

struct DecodeCase {
  std::string name;
  DType dtype = DType::kBf16;
  int s_q = 1, h_q = 1, h_kv = 1, page_size = 64;
  std::vector<std::int32_t> lengths;
  bool causal = false;
  bool strided = false;  // no tensor but cache_seqlens is contiguous
  bool with_lse = true;
  EmptyLse empty_lse = EmptyLse::kPositiveInfinity;
  double softmax_scale = 1.0 / 24.0;
  double deviation = 1.0;  // of q and kv_cache, which are normally distributed
};

std::ostream& operator<<(std::ostream& stream, const DecodeCase& decode_case);

// Small enough for the naive reference, wide enough to cross every edge that the kernels have.
const std::vector<DecodeCase>& decode_cases();
// Those that the GPU backend takes.
std::vector<DecodeCase> gpu_decode_cases();

// The tensors of a case. Pages are shuffled, rows and pages that no request uses hold NaN, table
// entries past a request's last page hold 2147480000, outputs lie between guard bytes.
class DecodeProblem {
 public:
  explicit DecodeProblem(const DecodeCase& decode_case, std::uint32_t seed = 1);

  // Arguments over the tensors as they stand in `place`, whose results take_back() brings here.
  [[nodiscard]] DecodeArgs args(Place&& place = HostPlace());
  [[nodiscard]] std::vector<TestTensor*> tensors() {
    return {&q, &kv_cache, &block_table, &cache_seqlens, &out, &lse};
  }
  // Reports, as GoogleTest failures, what differs from the reference by more than the tolerance,
  // and damaged guards.
  void check_result();
  // Fresh outputs.
  void clear_outputs();

  TestTensor q, kv_cache, block_table, cache_seqlens, out, lse;
  reference::DecodeProblem reference;

 private:
  DecodeCase case_;
};

}  // namespace flash_mla::test
