// The thread count and the thread pool of the CPU backend.
//
// A job hands out indices through one atomic counter to the threads that work on it: those of a
// runner, or of the pool. There is one pool per process, made at the first call that needs it and
// never destroyed; its threads sleep between calls. The caller works too, and does not wait for
// threads of the pool that have not woken up by the time the indices have run out.
#include "cpu/threads.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "cpu/cpu.h"

namespace flash_mla::cpu {
namespace {

constexpr std::int32_t kMaxThreads = 1024;

std::int32_t clamp_threads(std::int64_t wanted) {
  return static_cast<std::int32_t>(wanted < 1 ? 1 : wanted > kMaxThreads ? kMaxThreads : wanted);
}

// First number in an environment variable (OMP_NUM_THREADS may hold a list); 0 when there is none.
std::int64_t number_in_environment(const char* name) {
  const char* text = std::getenv(name);
  return text == nullptr ? 0 : std::strtol(text, nullptr, 10);
}

std::int32_t default_num_threads() {
  for (const char* name : {"FLASH_MLA_NUM_THREADS", "OMP_NUM_THREADS"}) {
    if (const std::int64_t wanted = number_in_environment(name); wanted > 0)
      return clamp_threads(wanted);
  }
#if defined(__linux__)
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) return clamp_threads(CPU_COUNT(&cpus));
#endif
  return clamp_threads(std::thread::hardware_concurrency());
}

std::atomic<std::int32_t> wanted_threads{0};  // 0: not asked for yet

struct Job {
  Task task = nullptr;
  void* context = nullptr;
  std::int64_t count = 0;
  std::atomic<std::int64_t> next_index{0};

  // Runs what is left of it, together with whoever else works on it.
  void work(std::int32_t thread) noexcept {
    for (;;) {
      const std::int64_t index = next_index.fetch_add(1, std::memory_order_relaxed);
      if (index >= count) return;
      task(context, index, thread);
    }
  }
};

class Pool {
 public:
  // False when another call holds the pool.
  bool run(Job& job, std::int32_t num_threads) noexcept {
    const std::unique_lock<std::mutex> held(busy_, std::try_to_lock);
    if (!held.owns_lock()) return false;
    grow(num_threads - 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      num_threads_ = num_threads;
      next_thread_ = 1;
      open_ = true;
      ++generation_;
    }
    wake_.notify_all();
    job.work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    open_ = false;
    done_.wait(lock, [this] { return active_ == 0; });
    return true;
  }

 private:
  void grow(std::int32_t wanted) noexcept {
    try {
      for (; num_workers_ < wanted; ++num_workers_) std::thread([this] { worker(); }).detach();
    } catch (const std::system_error&) {
      // The machine gives no more threads: those that there are do the work.
    } catch (const std::bad_alloc&) {
    }
  }

  void worker() noexcept {
    std::uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return open_ && generation_ != seen; });
      seen = generation_;
      if (next_thread_ >= num_threads_) continue;
      const std::int32_t thread = next_thread_++;
      Job* const job = job_;
      ++active_;
      lock.unlock();
      job->work(thread);
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_;               // held by the call whose job runs
  std::int32_t num_workers_ = 0;  // guarded by busy_

  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  std::int32_t num_threads_ = 0;
  bool open_ = false;  // workers may join the job
  std::uint64_t generation_ = 0;
  std::int32_t next_thread_ = 1;
  std::int32_t active_ = 0;  // workers in the job
};

std::atomic<Pool*> the_pool{nullptr};
std::atomic<Runner> the_runner{nullptr};

// A child of fork() has none of the threads: it forgets the runner and the parent's pool, and makes
// a pool of its own.
void forget_in_child() noexcept {
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    the_pool.store(nullptr);
    the_runner.store(nullptr);
  });
  static_cast<void>(registered);
}

// Null when there is no memory for it.
Pool* pool() noexcept {
  Pool* existing = the_pool.load(std::memory_order_acquire);
  if (existing != nullptr) return existing;
  forget_in_child();
  Pool* made = new (std::nothrow) Pool;
  if (the_pool.compare_exchange_strong(existing, made, std::memory_order_acq_rel)) return made;
  delete made;
  return existing;
}

}  // namespace

std::int32_t num_threads() noexcept {
  std::int32_t threads = wanted_threads.load(std::memory_order_relaxed);
  if (threads == 0) {
    const std::int32_t chosen = default_num_threads();
    if (wanted_threads.compare_exchange_strong(threads, chosen, std::memory_order_relaxed))
      return chosen;
  }
  return threads;
}

void set_num_threads(std::int32_t num_threads) noexcept {
  wanted_threads.store(clamp_threads(num_threads), std::memory_order_relaxed);
}

void set_runner(Runner runner) noexcept {
  forget_in_child();
  the_runner.store(runner);
}

void parallel_for(std::int64_t count, std::int32_t num_threads, Task task, void* context) noexcept {
  Job job{task, context, count};
  if (count < num_threads) num_threads = static_cast<std::int32_t>(count);
  if (num_threads > 1) {
    if (const Runner runner = the_runner.load(); runner != nullptr) {
      runner(
          num_threads, [](void* job, std::int32_t thread) { static_cast<Job*>(job)->work(thread); },
          &job);
    } else if (Pool* const shared = pool(); shared != nullptr && shared->run(job, num_threads)) {
      return;
    }
  }
  job.work(0);  // all of it, or what a runner has left
}

}  // namespace flash_mla::cpu
