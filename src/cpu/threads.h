// The thread count and the thread pool of the CPU backend.
#pragma once

#include <cstdint>

namespace flash_mla::cpu {

// Runs task(context, index, thread) for every index in 0 .. count - 1 and returns when all are
// done. `thread`, in 0 .. num_threads - 1, is the same for no two tasks at a time: it selects
// scratch. Indices are handed out in order. Runs on the calling thread alone when another call
// holds the pool, or when threads cannot be made. A task must not call parallel_for.
using Task = void (*)(void* context, std::int64_t index, std::int32_t thread);
void parallel_for(std::int64_t count, std::int32_t num_threads, Task task, void* context) noexcept;

// The same for a callable task(index, thread).
template <class Function>
void parallel_for(std::int64_t count, std::int32_t num_threads, Function& function) noexcept {
  parallel_for(
      count, num_threads,
      [](void* context, std::int64_t index, std::int32_t thread) {
        (*static_cast<Function*>(context))(index, thread);
      },
      &function);
}

}  // namespace flash_mla::cpu
