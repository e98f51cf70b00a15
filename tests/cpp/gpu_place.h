// The GPU as the tests see it: device memory, streams and graphs. gpu_place.cpp is the one test
// file that names the CUDA runtime.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>

#include "flash_mla/decode.h"
#include "place.h"

namespace flash_mla::test {

// Empty when GPU 0 runs the kernels, else why not.
std::string why_no_gpu();

// Device memory, filled with 0xFF bytes (NaN in every format).
class DeviceBuffer {
 public:
  explicit DeviceBuffer(std::size_t size);
  ~DeviceBuffer();
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  [[nodiscard]] std::byte* data() { return data_; }
  [[nodiscard]] std::size_t size() const { return size_; }
  void upload(std::span<const std::byte> bytes);
  void download(std::span<std::byte> bytes);

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

class GpuPlace : public Place {
 public:
  // A second put() of a tensor overwrites the first one's memory, so that a captured graph sees it.
  TensorView put(TestTensor& tensor) override { return put_as(tensor, tensor); }
  void take_back(TestTensor& tensor) override;
  // Puts `source` where `tensor` was put; they have the same size.
  TensorView put_as(TestTensor& tensor, TestTensor& source);

 private:
  std::map<const TestTensor*, std::unique_ptr<DeviceBuffer>> buffers_;
};

// A workspace between guard bytes, initialised.
class GpuWorkspace {
 public:
  explicit GpuWorkspace(const DecodeArgs& args);
  [[nodiscard]] const Workspace& get() const { return workspace_; }
  // True when the counters are as init_workspace() left them and nothing was written outside.
  bool intact();
  // What lies in the partial results, between the guards.
  [[nodiscard]] std::vector<std::byte> partials();
  void set_partials(std::span<const std::byte> bytes);

 private:
  std::vector<std::byte> snapshot();

  std::unique_ptr<DeviceBuffer> counters_, partials_;
  Workspace workspace_;
  std::vector<std::byte> first_;
};

class Stream {
 public:
  Stream();
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  [[nodiscard]] StreamHandle get() const { return stream_; }
  void synchronize();

 private:
  StreamHandle stream_ = nullptr;
};

// What `work` enqueues, captured into a graph.
class Graph {
 public:
  Graph(Stream& stream, const std::function<void()>& work);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void replay(Stream& stream);

 private:
  void* graph_ = nullptr;  // cudaGraphExec_t
};

}  // namespace flash_mla::test
