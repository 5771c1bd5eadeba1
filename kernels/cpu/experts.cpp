// Experts of a layer: the rows of each gathered, its two products, and what they give a token added up in its own order.
#include <vector>

#include "kernels.h"

namespace stepladder {

void mix(const float* x, int64_t T, const float* weights, const int64_t* chosen, int64_t per_token, const Experts& experts,
         float* y) {
  const int64_t H = experts.hidden, pairs = T * per_token;
  std::vector<int64_t> begin(experts.count + 1), place(pairs, -1);  // of each pair, its row among those sorted by expert
  for (int64_t p = 0; p < pairs; p++) {
    const int64_t expert = chosen[p] - experts.first;
    if (expert >= 0 && expert < experts.count) begin[expert + 1]++;
  }
  for (int64_t e = 0; e < experts.count; e++) begin[e + 1] += begin[e];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1), from(begin.back());
  for (int64_t p = 0; p < pairs; p++) {
    const int64_t expert = chosen[p] - experts.first;
    if (expert >= 0 && expert < experts.count) from[place[p] = next[expert]++] = p / per_token;
  }
  const int64_t rows = begin.back();
  std::vector<float> in(rows * H), inner(rows * experts.inner), out(rows * H);
  for (int64_t r = 0; r < rows; r++) std::copy_n(x + from[r] * H, H, in.data() + r * H);
  for (int64_t e = 0; e < experts.count; e++) {
    const int64_t count = begin[e + 1] - begin[e], first = begin[e];
    if (!count) continue;
    Numbers hidden{inner.data() + first * experts.inner, Form::fp32};
    product({in.data() + first * H, Form::fp32}, count, nullptr, experts.gate_up(e), hidden);
    product(hidden, count, nullptr, experts.down(e), {out.data() + first * H, Form::fp32});
  }
  share(T, pairs * H, [&](int64_t start, int64_t stop) {
    for (int64_t t = start; t < stop; t++) {
      std::fill_n(y + t * H, H, 0.0f);
      for (int64_t k = 0; k < per_token; k++) {
        const int64_t row = place[t * per_token + k];
        if (row < 0) continue;
        const float weight = weights[t * per_token + k];
        for (int64_t h = 0; h < H; h++) y[t * H + h] += weight * out[row * H + h];
      }
    }
  });
}

}  // namespace stepladder
