// What is done to one row at a time: norms, and rotary embedding with the write into the cache.
#include <algorithm>
#include <vector>

#include "kernels.h"

namespace stepladder {

void norm_row(const float* x, float* y, int64_t K, const Norm& norm) {
  const int64_t whole = K / LANES * LANES;
  float mean = 0;
  if (norm.layer) {
    vec sum{};
    for (int64_t k = 0; k < whole; k += LANES) sum += load(x + k);
    mean = sum_of(sum);
    for (int64_t k = whole; k < K; k++) mean += x[k];
    mean /= K;
  }
  vec squares{};
  for (int64_t k = 0; k < whole; k += LANES) {
    vec off = load(x + k) - mean;
    squares = fma(off, off, squares);
  }
  float square = sum_of(squares);
  for (int64_t k = whole; k < K; k++) square += (x[k] - mean) * (x[k] - mean);
  const float scale = 1.0f / std::sqrt(square / K + norm.eps);
  for (int64_t k = 0; k < whole; k += LANES) *(vec*)(y + k) = load(norm.weight + k) * ((load(x + k) - mean) * scale);
  for (int64_t k = whole; k < K; k++) y[k] = norm.weight[k] * ((x[k] - mean) * scale);
}

void norm_rows(Numbers x, Numbers y, int64_t T, int64_t K, const Norm& norm) {
  share(T, T * K, [&](int64_t begin, int64_t end) {
    std::vector<float> row(K);
    typed(x, [&](auto* from) {
      typed(y, [&](auto* to) {
        for (int64_t t = begin; t < end; t++) {
          convert(from + t * K, row.data(), K);
          norm_row(row.data(), row.data(), K, norm);
          convert(row.data(), to + t * K, K);
        }
      });
    });
  });
}

namespace {

void turn(const float* x, const float* cos, const float* sin, int64_t D, bool interleaved, float* y) {
  if (interleaved)
    for (int64_t i = 0; i < D; i += 2) {
      y[i] = x[i] * cos[i] - x[i + 1] * sin[i];
      y[i + 1] = x[i + 1] * cos[i + 1] + x[i] * sin[i + 1];
    }
  else
    for (int64_t i = 0; i < D / 2; i++) {
      y[i] = x[i] * cos[i] - x[i + D / 2] * sin[i];
      y[i + D / 2] = x[i + D / 2] * cos[i + D / 2] + x[i] * sin[i + D / 2];
    }
}

template <class C>
void store(const float* k, const float* v, int64_t slot, int64_t head, Heads heads, const Pages& pages, C* keys, C* values) {
  const int64_t block = slot / pages.size, place = slot % pages.size, page = (block * heads.kv + head) * pages.size * heads.D;
  C* key = keys + page + place / pages.lane * pages.lane * heads.D + place % pages.lane;
  for (int64_t d = 0; d < heads.D; d++) narrow(k[d], key + d * pages.lane);
  convert(v, values + page + place * heads.D, heads.D);
}

}  // namespace

void rotate(const float* qkv, const float* cos, const float* sin, const int64_t* slots, int64_t T, Heads heads,
            const Norm* q_norm, const Norm* k_norm, bool interleaved, const Pages& pages, float* q) {
  const int64_t D = heads.D;
  share(T, T * heads.width(), [&](int64_t begin, int64_t end) {
    std::vector<float> normed(D), turned(D);
    typed(pages.keys, [&](auto* keys) {
      auto* values = (decltype(keys))pages.values.data;
      for (int64_t t = begin; t < end; t++) {
        const float* row = qkv + t * heads.width();
        for (int64_t h = 0; h < heads.H + heads.kv; h++) {
          const bool is_query = h < heads.H;
          const int64_t head = is_query ? h : h - heads.H;
          const float* x = row + h * D;
          if (const Norm* norm = is_query ? q_norm : k_norm) {
            norm_row(x, normed.data(), D, {norm->weight + head * D, norm->eps, norm->layer});
            x = normed.data();
          }
          turn(x, cos + t * D, sin + t * D, D, interleaved, is_query ? q + (t * heads.H + head) * D : turned.data());
          if (!is_query) store(turned.data(), row + (heads.H + heads.kv + head) * D, slots[t], head, heads, pages, keys, values);
        }
      }
    });
  });
}

}  // namespace stepladder
