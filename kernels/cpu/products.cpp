// Matrix products with a norm before and a bias or SwiGLU behind.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "tile.h"

namespace stepladder {
namespace {

constexpr int64_t DEPTH = 256;  // of K at a time: a panel's part (64 KB of fp32) stays near while all rows pass it
constexpr int64_t MOST = 512;   // rows at a time: their sums for one panel are 128 KB
constexpr int64_t HALF = PANEL / 2;

// What becomes of the sums [T, 64] of a panel's columns [from, to): to y, of which `width` columns are there in all.
template <class Y>
void finish(float* sums, int64_t T, int64_t from, int64_t to, int64_t panel, const Matrix& matrix, Y* y) {
  const float* bias = matrix.bias ? matrix.bias + panel * PANEL : nullptr;
  const int64_t width = matrix.gated ? matrix.N / 2 : matrix.N, first = panel * (matrix.gated ? HALF : PANEL);
  for (int64_t t = 0; t < T; t++) {
    float* row = sums + t * PANEL;
    if (bias)
      for (int64_t c = from; c < to; c++) row[c] += bias[c];
    if (matrix.gated)
      for (int64_t c = 0; c < HALF; c += LANES) {
        vec gate = load(row + c);
        *(vec*)(row + c) = gate / (1.0f + exponential(-gate)) * load(row + HALF + c);
      }
    const int64_t end = std::min(matrix.gated ? HALF : to, width - first);
    if (end > from) convert(row + from, y + t * width + first + from, end - from);
  }
}

template <class W, class Y> void run(const float* x, int64_t T, const W* w, const Matrix& matrix, Y* y) {
  const int64_t K = matrix.K, panels = (matrix.N + PANEL - 1) / PANEL;
  const int64_t step = matrix.gated ? PANEL : HALF, units = panels * PANEL / step;
  share(units, T * K * matrix.N, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> sums, wide;  // kept, since pieces are many
    sums.resize(std::max<size_t>(sums.size(), std::min(T, MOST) * PANEL));
    // a part that several tiles of rows will read is widened once
    wide.resize(sizeof(W) < 4 && T > 4 * ROWS ? DEPTH * PANEL : 0);
    for (int64_t t = 0; t < T; t += MOST) {
      const int64_t rows = std::min(MOST, T - t);
      for (int64_t c = begin * step; c < end * step;) {
        const int64_t panel = c / PANEL, from = c % PANEL, to = std::min<int64_t>(PANEL, from + end * step - c);
        for (int64_t k = 0; k < K; k += DEPTH) {
          const W* part = w + (panel * K + k) * PANEL;
          const int64_t depth = std::min(DEPTH, K - k);
          // while the widened part is worked on, nobody else asks for the next one
          const int64_t tiles = (rows + ROWS - 1) / ROWS, each = wide.empty() ? 0 : sizeof(W) * PANEL / tiles;
          const Next next{(const char*)(part + depth * PANEL), each};
          auto pass = [&](auto* block) {
            multiply(x + t * K + k, K, rows, block + from, PANEL, sums.data() + from, PANEL, depth, to - from, k == 0, next);
          };
          if (wide.empty()) pass(part);
          else {
            for (int64_t i = 0; i < depth * PANEL; i += LANES) *(vec*)(wide.data() + i) = load(part + i);
            pass((const float*)wide.data());
          }
        }
        const int64_t out = matrix.gated ? matrix.N / 2 : matrix.N;
        finish(sums.data(), rows, from, to, panel, matrix, y + t * out);
        c += to - from;
      }
    }
  });
}

}  // namespace

void product(Numbers x, int64_t T, const Norm* norm, const Matrix& matrix, Numbers y) {
  std::vector<float> rows;
  if (norm || x.form != Form::fp32) {
    rows.resize(T * matrix.K);
    Numbers inner{rows.data(), Form::fp32};
    if (norm)
      norm_rows(x, inner, T, matrix.K, *norm);
    else
      typed(x, [&](auto* from) { convert(from, rows.data(), T * matrix.K); });
    x = inner;
  }
  typed(matrix.panels, [&](auto* w) { typed(y, [&](auto* out) { run((const float*)x.data, T, w, matrix, out); }); });
}

}  // namespace stepladder
