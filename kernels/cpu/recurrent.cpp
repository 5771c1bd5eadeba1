// A recurrent drafter: one more token through its cell, and what its logits foresee.
#include <limits>
#include <vector>

#include "kernels.h"

namespace stepladder {

void advance(const float* state, const float* embedded, int64_t N, int64_t H, const Cell& cell, float* next) {
  const int64_t inner = cell.gated.N / 2, width = inner + 2 * H;
  const std::vector<float> ones(H, 1.0f);
  const Norm rms{ones.data(), std::numeric_limits<float>::epsilon(), false};
  std::vector<float> x(N * 2 * H), hidden(N * inner), joined(N * width);
  for (int64_t n = 0; n < N; n++) {
    norm_row(state + n * H, x.data() + n * 2 * H, H, rms);
    norm_row(embedded + n * H, x.data() + n * 2 * H + H, H, rms);
  }
  product({x.data(), Form::fp32}, N, nullptr, cell.gated, {hidden.data(), Form::fp32});
  for (int64_t n = 0; n < N; n++) {
    float* row = joined.data() + n * width;
    std::copy_n(hidden.data() + n * inner, inner, row);
    std::copy_n(x.data() + n * 2 * H, 2 * H, row + inner);
  }
  product({joined.data(), Form::fp32}, N, nullptr, cell.out, {next, Form::fp32});
}

namespace {

// Of V numbers the place of the largest, the first of equals; -1 if one is no number.
int64_t largest(const float* x, int64_t V) {
  const int64_t whole = V / LANES * LANES;
  vec highest = all(-std::numeric_limits<float>::infinity());
  ivec broken{};
  for (int64_t i = 0; i < whole; i += LANES) {
    const vec value = load(x + i);
    broken |= value != value;
    highest = value > highest ? value : highest;
  }
  float best = -std::numeric_limits<float>::infinity();
  bool numbers = true;
  for (int lane = 0; lane < LANES; lane++) best = std::max(best, highest[lane]), numbers &= !broken[lane];
  for (int64_t i = whole; i < V; i++) best = std::max(best, x[i]), numbers &= x[i] == x[i];
  return numbers ? std::find(x, x + V, best) - x : -1;
}

// The sum of e^(x - most); fills y with (x - most) * scale, unless it is null.
float weigh(const float* x, int64_t V, float most, float scale, float* y) {
  const int64_t whole = V / LANES * LANES;
  vec sum{};
  for (int64_t i = 0; i < whole; i += LANES) {
    const vec off = load(x + i) - most;
    sum += exponential(off);
    if (y) *(vec*)(y + i) = off * scale;
  }
  float total = sum_of(sum);
  for (int64_t i = whole; i < V; i++) {
    total += std::exp(x[i] - most);
    if (y) y[i] = (x[i] - most) * scale;
  }
  return total;
}

}  // namespace

void foresee(const float* logits, const int64_t* tokens, int64_t N, int64_t V, const double* temperatures,
             const int64_t* seeds, const int64_t* positions, int64_t* drawn, float* most) {
  std::vector<float> scores(V);
  for (int64_t n = 0; n < N; n++) {
    const float* row = logits + n * V;
    int64_t column = largest(row, V);
    most[n] = 0;
    if (column >= 0) {
      const bool draws = temperatures[n] > 0;
      const float least = std::numeric_limits<float>::min();
      const float scale = draws ? 1.0f / std::max((float)temperatures[n], least) : 1.0f;
      most[n] = 1.0f / weigh(row, V, row[column], scale, draws ? scores.data() : nullptr);
      if (draws) draw(scores.data(), tokens, 1, V, seeds + n, positions + n, &column);
    }
    drawn[n] = column < 0 ? -1 : tokens[column];
  }
}

}  // namespace stepladder
