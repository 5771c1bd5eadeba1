// Attention over pages of the cache, for any mixture of prefills, decodes and verification rows: nothing is gathered and
// nothing padded. A row's bits depend on its own context alone:
//
// - Its context is cut into parts at fixed positions. Of each part: scores (chains along D), their maximum, exponentials
//   summed in lanes by position, values (chains along positions).
// - Parts are put together in their order, each weighed by its maximum (online softmax, Milakov & Gimelshein 1805.02867).
// - A position that a row does not see has a weight of exactly 0, which changes no sum; so it does not matter what the
//   other rows of a tile see.
#include <algorithm>
#include <limits>
#include <vector>

#include "kernels.h"
#include "tile.h"

namespace stepladder {
namespace {

constexpr int64_t MANY = 48;   // rows of a task: they share what is read of the cache
constexpr int64_t PART = 512;  // positions, or as many whole lanes of a block as there are in them
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

struct Task {
  int64_t sequence, head, row, rows, work;  // rows: (token, query head of this KV head), one behind the other
};

struct Scratch {
  std::vector<float> q, scores, part, sum, wide;
};

// f(numbers as fp32, or as they are), n of the cache: several tiles of rows read what has been widened once.
template <class C, class F> void seen(const C* from, int64_t n, int64_t rows, Scratch& scratch, F f) {
  if (sizeof(C) == 4 || rows <= 2 * ROWS) return f(from);
  scratch.wide.resize(std::max<int64_t>(scratch.wide.size(), n));
  convert(from, scratch.wide.data(), n);
  f((const float*)scratch.wide.data());
}

// Turns scores [n] into their exponentials, 0 outside [from, to); returns the maximum and adds up in `total`.
float soften(float* scores, int64_t n, int64_t from, int64_t to, float* total) {
  std::fill(scores, scores + std::clamp<int64_t>(from, 0, n), NOTHING);
  std::fill(scores + std::clamp<int64_t>(to, 0, n), scores + n, NOTHING);
  vec tops = all(NOTHING), sums{};
  for (int64_t i = 0; i < n; i += LANES) {
    vec now = load(scores + i);
    tops = now > tops ? now : tops;
  }
  float top = NOTHING;
  for (int i = 0; i < LANES; i++) top = std::max(top, tops[i]);
  if (top == NOTHING) return top;
  for (int64_t i = 0; i < n; i += LANES) {
    vec now = exponential(load(scores + i) - top);
    *(vec*)(scores + i) = now;
    sums += now;
  }
  *total = sum_of(sums);
  return top;
}

// Puts the next part (its maximum, sum and values) to what is there.
void merge(float& top, float& total, float* y, float part_top, float part_total, const float* part, int64_t D) {
  if (part_top == NOTHING) return;
  const float most = std::max(top, part_top), old = exponential(all(top - most))[0], now = exponential(all(part_top - most))[0];
  top = most;
  total = total * old + part_total * now;
  for (int64_t d = 0; d < D; d++) y[d] = y[d] * old + part[d] * now;
}

template <class C>
void run(const Task& task, const float* q, const Pages& pages, const C* keys, const C* values, const Batch& batch,
         Heads heads, int64_t window, float* y, Scratch& scratch) {
  const int64_t D = heads.D, G = heads.H / heads.kv, lane = pages.lane, R = task.rows;
  const int64_t* table = batch.tables + task.sequence * batch.width;
  const int64_t span = std::max<int64_t>(1, PART / lane) * lane, width = (span + LANES - 1) / LANES * LANES;
  scratch.q.resize(R * D), scratch.part.resize(R * D), scratch.sum.resize(R * D), scratch.scores.resize(R * width);
  float *part = scratch.part.data(), *sum = scratch.sum.data(), *scores = scratch.scores.data();
  int64_t from[MANY], to[MANY], place[MANY], begin = std::numeric_limits<int64_t>::max(), end = 0;
  float top[MANY], total[MANY], scale = 1.0f / std::sqrt((float)D);
  for (int64_t r = 0; r < R; r++) {
    const int64_t token = batch.first[task.sequence] + (task.row + r) / G;
    place[r] = (token * heads.H + task.head * G + (task.row + r) % G) * D;
    to[r] = batch.positions[token] + 1, from[r] = window ? std::max<int64_t>(0, to[r] - window) : 0;
    begin = std::min(begin, from[r]), end = std::max(end, to[r]);
    top[r] = NOTHING, total[r] = 0;
    for (int64_t d = 0; d < D; d++) scratch.q[r * D + d] = q[place[r] + d] * scale, sum[r * D + d] = 0;
  }
  for (int64_t low = begin / span * span; low < end; low += span) {
    const int64_t high = std::min(low + span, end), start = std::max(low, begin / lane * lane);
    const int64_t n = (high - low + LANES - 1) / LANES * LANES;
    auto page = [&](int64_t position) { return (table[position / pages.size] * heads.kv + task.head) * pages.size * D; };
    for (int64_t p = start; p < high; p += lane)
      seen(keys + page(p) + p % pages.size * D, D * lane, R, scratch, [&](auto* k) {
        multiply(scratch.q.data(), D, R, k, lane, scores + p - low, width, D, lane, true);
      });
    float part_top[MANY], part_total[MANY];
    for (int64_t r = 0; r < R; r++)
      part_top[r] = soften(scores + r * width, n, std::max(from[r], start) - low, std::min(to[r], high) - low, part_total + r);
    for (int64_t p = start; p < high;) {
      const int64_t stop = std::min((p / pages.size + 1) * pages.size, high);
      seen(values + page(p) + p % pages.size * D, (stop - p) * D, R, scratch, [&](auto* v) {
        multiply(scores + p - low, width, R, v, D, part, D, stop - p, D, p == start);
      });
      p = stop;
    }
    for (int64_t r = 0; r < R; r++) merge(top[r], total[r], sum + r * D, part_top[r], part_total[r], part + r * D, D);
  }
  for (int64_t r = 0; r < R; r++)
    for (int64_t d = 0; d < D; d++) y[place[r] + d] = sum[r * D + d] / total[r];
}

}  // namespace

void attend(const float* q, const Pages& pages, const Batch& batch, Heads heads, int64_t window, float* y) {
  std::vector<Task> tasks;
  int64_t work = 0;
  const int64_t G = heads.H / heads.kv;
  for (int64_t b = 0; b < batch.B; b++) {
    const int64_t rows = (batch.first[b + 1] - batch.first[b]) * G;
    for (int64_t row = 0; row < rows; row += MANY) {
      const int64_t count = std::min(MANY, rows - row), last = batch.first[b] + (row + count - 1) / G;
      const int64_t seen = batch.positions[last] + 1, each = count * heads.D * (window ? std::min(window, seen) : seen);
      for (int64_t head = 0; head < heads.kv; head++) tasks.push_back({b, head, row, count, each}), work += each;
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work > b.work; });
  auto each = [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    typed(pages.keys, [&](auto* keys) {
      auto* values = (decltype(keys))pages.values.data;
      for (int64_t i = begin; i < end; i++) run(tasks[i], q, pages, keys, values, batch, heads, window, y, scratch);
    });
  };
  share(tasks.size(), work, each, true);
}

}  // namespace stepladder
