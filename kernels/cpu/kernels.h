// What the kernels are called with: plain pointers, so that only library.cpp has to know what a tensor is.
//
// Letters: T rows (tokens), K inputs, N outputs, H query heads, G of them per KV head, D head dim.
#pragma once
#include <algorithm>

#include "team.h"
#include "vec.h"

namespace stepladder {

constexpr int PANEL = 64;         // outputs of a panel
constexpr int64_t SMALL = 131072;  // multiply-adds of some ten microseconds: hardly more than to wake another thread takes

enum class Form { fp32, bf16, fp16 };

struct Numbers {  // a tensor's memory
  void* data;
  Form form;
};

// f(pointer) with the pointer's own type.
template <class F> static inline auto typed(Numbers n, F f) {
  switch (n.form) {
    case Form::bf16: return f((bf16*)n.data);
    case Form::fp16: return f((fp16*)n.data);
    default: return f((float*)n.data);
  }
}

// How many threads kernels compute with: torch's own number, or what that was before `take_threads`.
int threads();

// f(first, last) over [0, n), on all threads if all of it is `work` multiply-adds enough. Pieces are of a
// few microseconds at least, or of one number each where these are of very different work.
template <class F> static inline void share(int64_t n, int64_t work, F f, bool uneven = false) {
  if (work < SMALL) return f(0, n);
  const int64_t least = uneven ? 1 : std::max<int64_t>(1, n * (SMALL / 8) / work), most = uneven ? 1 : n;
  take_turns(n, {least, most}, threads(), [](void* f, int64_t begin, int64_t end) noexcept { (*(F*)f)(begin, end); }, &f);
}

struct Norm {  // weight: fp32; layer: subtract the mean (Ba et al. 1607.06450), else RMS (Zhang & Sennrich 2019, eq. 4)
  const float* weight;
  float eps;
  bool layer;
};

// One row of K numbers.
void norm_row(const float* x, float* y, int64_t K, const Norm& norm);

// x [T, K] -> y [T, K].
void norm_rows(Numbers x, Numbers y, int64_t T, int64_t K, const Norm& norm);

struct Matrix {  // panels: [N / 64][K][64]; gated: of a panel the first 32 are gates, the others what they let through
  Numbers panels;
  const float* bias;  // [N / 64][64], or null
  int64_t N, K;
  bool gated;
};

// x [T, K] -> y [T, N], or silu(gate x) * up x [T, N / 2]; `norm`, unless null, is of each row of x first.
void product(Numbers x, int64_t T, const Norm* norm, const Matrix& matrix, Numbers y);

struct Heads {
  int64_t H, kv, D;
  int64_t width() const { return (H + 2 * kv) * D; }
};

struct Pages {  // keys [blocks, kv, size / lane, D, lane], values [blocks, kv, size, D]
  Numbers keys, values;
  int64_t size, lane;
};

// qkv [T, (H + 2 kv) D]: query and key heads normed (unless null) and turned, keys and values into the pages' slots [T].
// cos, sin [T, D]. Weights of the norms: [H, D] and [kv, D]. Queries [T, H, D] come out.
void rotate(const float* qkv, const float* cos, const float* sin, const int64_t* slots, int64_t T, Heads heads,
            const Norm* q_norm, const Norm* k_norm, bool interleaved, const Pages& pages, float* q);

struct Batch {  // sequences [B]: rows first[b] to first[b + 1], at `positions` [T]; tables [B, width] of cache blocks
  const int64_t *first, *positions, *tables;
  int64_t B, width;
};

// q [T, H, D] -> y [T, H, D]. A row sees its own position and those before it, or the last `window` of these if not 0.
void attend(const float* q, const Pages& pages, const Batch& batch, Heads heads, int64_t window, float* y);

// Draws from softmax(scores), scores [R, V] of `tokens` [V] or of the first V: the column of every row with the largest sum
// of score and Gumbel noise, or -1 if a score is no number, or two come so close that how noise is rounded decides.
void draw(const float* scores, const int64_t* tokens, int64_t R, int64_t V, const int64_t* seeds, const int64_t* positions,
          int64_t* columns);

// The same from softmax(logits / temperature); at temperature 0 the likeliest. shares, unless null: the largest number of
// softmax(logits) in each row, 0 where one is no number.
void sample(const float* logits, const int64_t* tokens, int64_t R, int64_t V, const double* temperatures, const int64_t* seeds,
            const int64_t* positions, int64_t* columns, float* shares);

struct Experts {  // `count` networks, the first of them number `first`: [hidden] to [inner] gated, and back
  Numbers in, out;  // panels of one expert after those of the other
  int64_t in_size, out_size;  // numbers of one
  int64_t count, first, hidden, inner;
  Matrix gate_up(int64_t e) const { return {at(in, e * in_size), nullptr, 2 * inner, hidden, true}; }
  Matrix down(int64_t e) const { return {at(out, e * out_size), nullptr, hidden, inner, false}; }
  static Numbers at(Numbers n, int64_t i) { return {(char*)n.data + i * (n.form == Form::fp32 ? 4 : 2), n.form}; }
};

// x [T, hidden]; weights and chosen [T, per_token] -> y [T, hidden]: the weighted sum of those experts that are here.
void mix(const float* x, int64_t T, const float* weights, const int64_t* chosen, int64_t per_token, const Experts& experts,
         float* y);

struct Cell {  // of a recurrent drafter: `gated` of [rms(state), rms(embedded)], `out` of what that gives and the same
  Matrix gated, out;
};

// state, embedded [N, H] -> next [N, H].
void advance(const float* state, const float* embedded, int64_t N, int64_t H, const Cell& cell, float* next);

}  // namespace stepladder
