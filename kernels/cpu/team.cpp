// One word says it all: `turn` is the number of a job and, below it, where what nobody has taken begins. A piece is taken by
// raising the word from the value that was read, so of what a job is (piece, work, n) only what belongs to it is ever used:
// between two jobs the word is closed, and after that no value read before fits.
#include "team.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <system_error>
#include <thread>

namespace stepladder {
namespace {

constexpr uint64_t CLOSED = 0xffffffff;  // nothing is left
constexpr int AWAKE = 20000;  // looks, half a millisecond: longer than between two jobs of a step

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `word` is another than `old`: awake first, then asleep.
template <class T> T changed(const std::atomic<T>& word, T old) {
  for (int i = 0; i < AWAKE; i++, pause())
    if (T now = word.load(std::memory_order_acquire); now != old) return now;
  word.wait(old, std::memory_order_acquire);
  return word.load(std::memory_order_acquire);
}

class Team {
 public:
  void take_turns(int64_t n, Sizes sizes, int threads, Piece piece, void* work) {
    std::unique_lock mine(busy, std::defer_lock);
    // somebody else's job has the team, or there is nothing to share: alone
    if (threads < 2 || n <= sizes.least || n >= (int64_t)CLOSED || !mine.try_lock()) return piece(work, 0, n);
    hire(threads - 1);
    job.piece = piece, job.work = work, job.n = n, job.least = sizes.least, job.most = sizes.most, job.threads = threads;
    done.store(0, std::memory_order_relaxed);
    const uint32_t number = called.load(std::memory_order_relaxed) + 1;
    turn.store((uint64_t)number << 32, std::memory_order_release);
    called.store(number, std::memory_order_release);
    called.notify_all();
    take(number);
    for (uint32_t seen; (seen = done.load(std::memory_order_acquire)) < n;) changed(done, seen);
    turn.exchange((uint64_t)number << 32 | CLOSED, std::memory_order_acq_rel);
  }

 private:
  void hire(int wanted) {
    try {
      for (; helpers < wanted; helpers++) std::thread([this, place = helpers] { help(place); }).detach();
    } catch (const std::system_error&) {  // no more threads are to be had; those that are there do it
    }
  }

  void help(int place) {
    for (uint32_t number = 0;;) {
      number = changed(called, number);
      if (place < job.threads - 1) take(number);
    }
  }

  void take(uint32_t number) {
    for (uint64_t now = turn.load(std::memory_order_acquire);;) {
      const Piece piece = job.piece;
      void* const work = job.work;
      const int64_t n = job.n, least = job.least, most = job.most, threads = job.threads, next = now & CLOSED;
      if (now >> 32 != number || next >= n) return;
      int64_t size = std::max(least, (n - next) / (2 * threads));
      if (n - next > threads) size = std::max<int64_t>(2, size & ~1);  // two by two lie together; halves only at the end
      size = std::min({size, most, n - next});
      if (!turn.compare_exchange_strong(now, now + size, std::memory_order_acq_rel)) continue;
      piece(work, next, next + size);
      if ((int64_t)done.fetch_add(size, std::memory_order_acq_rel) + size == n) done.notify_all();
      now = turn.load(std::memory_order_acquire);
    }
  }

  struct Job {  // atomic, since a helper may read of the next one what it will then not use
    std::atomic<Piece> piece;
    std::atomic<void*> work;
    std::atomic<int64_t> n, least, most, threads;
  };

  std::mutex busy;
  int helpers = 0;
  Job job{};
  alignas(64) std::atomic<uint64_t> turn{CLOSED};
  alignas(64) std::atomic<uint32_t> done{0};
  alignas(64) std::atomic<uint32_t> called{0};
};

}  // namespace

void take_turns(int64_t n, Sizes sizes, int threads, Piece piece, void* work) {
  static Team* team = new Team;  // never deleted: its threads may outlive what main() leaves behind
  team->take_turns(n, sizes, threads, piece, work);
}

}  // namespace stepladder
