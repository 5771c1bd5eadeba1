// A recurrent drafter: one more token through its cell.
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

}  // namespace stepladder
