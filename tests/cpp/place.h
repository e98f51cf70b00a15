// Where a test's tensors live while the library works on them: here, or on a GPU (gpu_place.h).
#pragma once

#include "test_tensor.h"

namespace flash_mla::test {

class Place {
 public:
  virtual ~Place() = default;
  // The tensor's bytes, guards included, as they stand now; an undefined tensor stays undefined.
  virtual TensorView put(TestTensor& tensor) = 0;
  // Brings back what the library wrote.
  virtual void take_back(TestTensor& tensor) = 0;
};

class HostPlace : public Place {
 public:
  TensorView put(TestTensor& tensor) override { return tensor.view(); }
  void take_back(TestTensor&) override {}
};

}  // namespace flash_mla::test
