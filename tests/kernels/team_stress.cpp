// Callers that share one team, more of them than cores: every number is computed once, by somebody, before a job returns.
// What a job computes with lies on its caller's stack, so a helper that came late to a job that is over would be caught.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "team.h"

struct Job {
  std::vector<int> times;
};

static void compute(void* work, int64_t begin, int64_t end) noexcept {
  for (int64_t i = begin; i < end; i++) ((Job*)work)->times[i]++;
}

static void call(int seed, int jobs) {
  for (int i = 0; i < jobs; i++) {
    const int n = 1 + (seed * 7919 + i * 104729) % 97, least = 1 + i % 3;
    Job job{std::vector<int>(n)};
    stepladder::take_turns(n, {least, i % 5 ? n : least}, 1 + i % 4, compute, &job);
    for (int times : job.times)
      if (times != 1) std::fprintf(stderr, "a number of %d was computed %d times\n", n, times), std::_Exit(1);
    if (i % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));  // long enough for helpers to fall asleep
  }
}

int main(int, char** arguments) {
  const int callers = std::atoi(arguments[1]), jobs = std::atoi(arguments[2]);
  std::vector<std::thread> threads;
  for (int i = 0; i < callers; i++) threads.emplace_back(call, i, jobs);
  for (auto& thread : threads) thread.join();
  std::printf("%d jobs\n", callers * jobs);
  std::fflush(stdout);
  std::_Exit(0);  // helpers never end
}
