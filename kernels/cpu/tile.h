// The one inner loop of products and of attention: y [M, n] (+)= x [M, K] w [K, n].
//
// Every output is one chain of fused multiply-adds in the order of K, which is then added to what was there, whatever M and
// n are. So a row's bits do not depend on the rows beside it; they do on where K is cut, so cuts are at fixed places.
#pragma once
#include "vec.h"

namespace stepladder {

constexpr int ROWS = 6;   // of a tile: with four vectors of AVX-512 each, 24 sums, enough to hide the latency of an FMA
constexpr int AHEAD = 24; // rows of w that are fetched ahead

// Memory that is to be near when the products under way are done; each step of a tile fetches `share` bytes of it.
struct Next {
  const char* from = nullptr;
  int64_t share = 0;
};

// Vectors of a tile with M rows: as many as leave a quarter of the registers for w and x, at most 64 columns.
constexpr int vectors(int M) {
  int J = 64 / LANES;
  while (J > 1 && M * J > REGISTERS * 3 / 4) J /= 2;
  return J;
}

template <int M, int J, class W>
static inline void tile(const float* x, int64_t ldx, const W* w, int64_t ldw, float* y, int64_t ldy, int64_t K, bool first, Next next) {
  vec sum[M][J];
  for (int m = 0; m < M; m++)
    for (int j = 0; j < J; j++) sum[m][j] = vec{};
  for (int64_t k = 0; k < K; k++) {
    const W* row = w + k * ldw;
    vec now[J];
    for (int j = 0; j < J; j++) now[j] = load(row + j * LANES);
    for (int byte = 0; byte < (int)(J * LANES * sizeof(W)); byte += 64) __builtin_prefetch((const char*)(row + AHEAD * ldw) + byte);
    for (int64_t byte = 0; byte < next.share; byte += 64) __builtin_prefetch(next.from + k * next.share + byte, 0, 2);
    for (int m = 0; m < M; m++) {
      vec scale = all(x[m * ldx + k]);
      for (int j = 0; j < J; j++) sum[m][j] = fma(scale, now[j], sum[m][j]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int j = 0; j < J; j++) {
      vec* out = (vec*)(y + m * ldy + j * LANES);
      *out = first ? sum[m][j] : *out + sum[m][j];
    }
}

template <int M, class W>
static inline void strip(const float* x, int64_t ldx, const W* w, int64_t ldw, float* y, int64_t ldy, int64_t K, int64_t n, bool first, Next next) {
  constexpr int J = vectors(M);
  int64_t c = 0;
  for (; c + J * LANES <= n; c += J * LANES) tile<M, J>(x, ldx, w + c, ldw, y + c, ldy, K, first, next), next = {};
  if constexpr (J > 1)
    for (; c + LANES <= n; c += LANES) tile<M, 1>(x, ldx, w + c, ldw, y + c, ldy, K, first, {});
  for (; c < n; c++)
    for (int m = 0; m < M; m++) {
      float sum = 0;
      for (int64_t k = 0; k < K; k++) sum = fma(x[m * ldx + k], widen(w[k * ldw + c]), sum);
      y[m * ldy + c] = first ? sum : y[m * ldy + c] + sum;
    }
}

// Any number of rows, in tiles as even as can be.
template <class W>
static inline void multiply(const float* x, int64_t ldx, int64_t M, const W* w, int64_t ldw, float* y, int64_t ldy, int64_t K, int64_t n, bool first, Next next = {}) {
  for (int64_t tiles = (M + ROWS - 1) / ROWS, rows; tiles > 0; tiles--, M -= rows, x += rows * ldx, y += rows * ldy, next.from += K * next.share) {
    rows = (M + tiles - 1) / tiles;
    switch (rows) {
      case 1: strip<1>(x, ldx, w, ldw, y, ldy, K, n, first, next); break;
      case 2: strip<2>(x, ldx, w, ldw, y, ldy, K, n, first, next); break;
      case 3: strip<3>(x, ldx, w, ldw, y, ldy, K, n, first, next); break;
      case 4: strip<4>(x, ldx, w, ldw, y, ldy, K, n, first, next); break;
      case 5: strip<5>(x, ldx, w, ldw, y, ldy, K, n, first, next); break;
      default: strip<ROWS>(x, ldx, w, ldw, y, ldy, K, n, first, next);
    }
  }
}

}  // namespace stepladder
