// The threads of the CPU backend: its own pool, or those of the program it is in.
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

// A runner calls work(context, thread) for every thread in 0 .. num_threads - 1, at the same time
// as far as it can, and returns when all calls have returned. Calls that it does not make leave
// more to do for the others, and for the caller.
using Work = void (*)(void* context, std::int32_t thread);
using Runner = void (*)(std::int32_t num_threads, Work work, void* context);

// From now on parallel_for uses `runner` instead of the pool; null: the pool. A forked child goes
// back to the pool, because the runner's threads are not there.
void set_runner(Runner runner) noexcept;

}  // namespace flash_mla::cpu
