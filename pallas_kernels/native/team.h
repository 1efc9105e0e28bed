// The threads that share the work of one product.
//
// Waking a sleeping thread takes longer than a small product, and a decoding model calls
// one product after the other with little in between. So the helpers of a team, threads of
// our own as many as XLA's pool has less one, look out for the next product for a short
// while before they sleep. There is one team in a process; a call that finds it at work
// takes threads of XLA's pool instead.

#pragma once

#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#include "ffi.h"

namespace qjax {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

class Team {
 public:
  // Runs `work(i)` for every i below `count` on the calling thread and up to
  // `threads - 1` others. Returns whether all returned true.
  template <typename Work>
  static bool run(xla::ffi::ThreadPool& pool, int64_t threads, int64_t count,
                  const Work& work) {
    if (threads < 2 || count < 2) {
      bool good = true;
      for (int64_t i = 0; i < count; ++i) good = work(i) && good;
      return good;
    }
    auto job = std::make_shared<Job>();
    job->count = count;
    job->work = &work;
    std::fegetenv(&job->mode);
    job->call = [](const void* work, int64_t i) {
      return (*static_cast<const Work*>(work))(i);
    };
    Team& team = one();
    if (team.busy_.exchange(true, std::memory_order_acquire)) {
      for (int64_t i = 1; i < threads && i < count; ++i) {
        pool.Schedule([job] { job->claim(); });
      }
      job->claim();
      job->wait();
    } else {
      team.lead(job, threads - 1);
      team.busy_.store(false, std::memory_order_release);
    }
    return !job->failed;
  }

 private:
  // How long helpers look out for work before they sleep.
  static constexpr std::chrono::microseconds kLookout{200};

  struct Job {
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> failed{false};
    int64_t count = 0;
    const void* work = nullptr;
    std::fenv_t mode;  // of the caller: XLA's threads flush subnormal floats to zero
    bool (*call)(const void*, int64_t) = nullptr;

    // The caller claims like its helpers and never waits for one that has not begun.
    void claim() {
      for (int64_t i; (i = next.fetch_add(1)) < count;) {
        if (!call(work, i)) failed = true;
        done.fetch_add(1, std::memory_order_release);
      }
    }

    void wait() {
      for (int spins = 0; done.load(std::memory_order_acquire) < count; ++spins) {
        if (spins < 2000) {
          relax();
        } else {
          std::this_thread::yield();
        }
      }
    }
  };

  // Never destroyed: its threads may outlive everything else in a process.
  static Team& one() {
    static Team* team = new Team;
    return *team;
  }

  void lead(const std::shared_ptr<Job>& job, int64_t helpers) {
    std::atomic_store(&job_, job);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      turn_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load() > 0) wake_.notify_all();
    for (; helpers_ < helpers; ++helpers_) {
      std::thread([this, seen = turn_.load() - 1] { help(seen); }).detach();
    }
    job->claim();
    job->wait();
  }

  void help(uint64_t seen) {
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + kLookout;
      for (int spins = 1; turn_.load(std::memory_order_acquire) == seen; ++spins) {
        relax();
        if (spins % 64 == 0 && std::chrono::steady_clock::now() > until) {
          std::unique_lock<std::mutex> lock(mutex_);
          ++sleeping_;
          wake_.wait(lock, [&] { return turn_.load() != seen; });
          --sleeping_;
        }
      }
      seen = turn_.load(std::memory_order_acquire);
      const auto job = std::atomic_load(&job_);
      std::fesetenv(&job->mode);
      job->claim();
    }
  }

  std::atomic<bool> busy_{false};
  std::atomic<uint64_t> turn_{0};
  std::atomic<int> sleeping_{0};
  std::shared_ptr<Job> job_;
  std::mutex mutex_;
  std::condition_variable wake_;
  int64_t helpers_ = 0;
};

// Runs `work(i)` for every i below `count` on a team of threads.
template <typename Work>
static bool parallel(xla::ffi::ThreadPool& pool, int64_t threads, int64_t count,
              const Work& work) {
  return Team::run(pool, threads, count, [&](int64_t i) {
    try {
      work(i);
      return true;
    } catch (const std::bad_alloc&) {
      return false;
    }
  });
}

}  // namespace qjax
