// Host-side help for callers of the backend: stream capture, and device memory for counters.
#pragma once

#include <cstddef>
#include <cstdint>

#include "flash_mla/decode.h"
#include "flash_mla/status.h"

namespace flash_mla::cuda {

// True while `stream` is being captured into a CUDA graph; then `*capture_id`, when not null, gets
// the id of the capture.
[[nodiscard]] bool is_capturing(StreamHandle stream, std::uint64_t* capture_id) noexcept;

// `bytes` > 0 of zeroed device memory, 256-byte aligned, ready when the call returns. Legal while
// this or another thread captures, in any capture mode: the memory never becomes part of a graph.
// Thread-safe.
//
// NOTE: the memory is never freed. A graph that was captured with the address can be replayed at
// any later time, and nothing tells us that it is gone. It is a few KB of counters for a captured
// graph, and for a stream 35 MB with its partial results. C++ callers who want control bring their
// own Workspace instead.
// Errors: kCudaError, kInvalidArgument (no such device).
Status allocate_counters(std::int32_t device, std::size_t bytes, void** out) noexcept;

}  // namespace flash_mla::cuda
