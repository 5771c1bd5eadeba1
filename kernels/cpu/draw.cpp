// Draws with the Gumbel noise of kernels/noise.py, without computing the noise of tokens that cannot win.
#include <limits>
#include <vector>

#include "kernels.h"

namespace stepladder {
namespace {

constexpr float SLACK = 1e-3f;  // far above what fp32 rounds away here
constexpr int64_t UNDECIDED = -1;

// `_mix` of kernels/noise.py, in lanes of 32 bits.
template <class U> static inline U mix(U x, U key) {
  x = (x ^ (x >> 16)) * 0x7feb352du ^ key;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// No less than the noise -ln(-ln u), u = (bits + 1/2) / 2^32, and hardly more where that is large. -ln u is at least
// v = 1 - u; and log2 v is at least what v's own exponent and mantissa say when read as one number.
vec bound(uvec bits) {
  vec v = __builtin_convertvector(~bits, vec) + 0.5f;
  return 0.69314718f * (159.0f - __builtin_convertvector((ivec)v, vec) * 0x1p-23f);
}

// Of V numbers the place of the largest, the first of equals; UNDECIDED if one is no number.
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
  return numbers ? std::find(x, x + V, best) - x : UNDECIDED;
}

// The sum of e^(x - most).
float weight_of(const float* x, int64_t V, float most) {
  const int64_t whole = V / LANES * LANES;
  vec sum{};
  for (int64_t i = 0; i < whole; i += LANES) sum += exponential(load(x + i) - most);
  float total = sum_of(sum);
  for (int64_t i = whole; i < V; i++) total += std::exp(x[i] - most);
  return total;
}

float noise(uint32_t bits) { return (float)-std::log(-std::log((bits + 0.5) / 4294967296.0)); }

struct Row {  // of numbers x, which stand for the scores (x - off) * scale
  const float* x;
  float off = 0, scale = 1;
};

// The column of one row that wins; UNDECIDED if a score is no number, or if two are so close that how the noise is rounded
// decides. hashes, most: V numbers, with room for whole vectors; the latter is for what each column comes to at most.
int64_t winner(const Row& row, const uint32_t* hashes, int64_t V, uint32_t first, uint32_t second, float* most) {
  const vec nothing = all(-std::numeric_limits<float>::infinity());
  const uvec f = uvec{} + first, s = uvec{} + second;
  vec highest = nothing;
  ivec broken{};
  for (int64_t i = 0; i < V; i += LANES) {
    vec score = nothing;
    memcpy(&score, row.x + i, 4 * std::min<int64_t>(LANES, V - i));
    score = (score - row.off) * row.scale;
    vec value = score + bound(mix<uvec>(*(const uvec*)(hashes + i) ^ f, s));
    broken |= score != score;
    highest = value > highest ? value : highest;
    *(vec*)(most + i) = value;
  }
  float best = highest[0];
  for (int lane = 0; lane < LANES; lane++) {
    if (broken[lane]) return UNDECIDED;
    best = std::max(best, highest[lane]);
  }
  if (!std::isfinite(best)) return UNDECIDED;
  // What the likeliest of them really comes to is a bar that nobody below can win over.
  const auto exact = [&](int64_t i) { return (row.x[i] - row.off) * row.scale + noise(mix<uint32_t>(hashes[i] ^ first, second)); };
  const int64_t likeliest = std::find(most, most + V, best) - most;
  int64_t won = likeliest;
  float reached = exact(won), next = nothing[0];
  const vec bar = all(reached - SLACK);
  for (int64_t i = 0; i < V; i += LANES) {
    ivec over = load(most + i) >= bar;
    int32_t any = 0;
    for (int lane = 0; lane < LANES; lane++) any |= over[lane];
    if (!any) continue;
    for (int64_t at = i; at < std::min(V, i + LANES); at++) {
      if (!over[at - i] || at == likeliest) continue;
      const float value = exact(at);
      next = std::max(next, std::min(value, reached));
      if (value > reached) reached = value, won = at;
    }
  }
  return next < reached - SLACK ? won : UNDECIDED;
}

// What each token's noise begins with: the same for all rows.
const uint32_t* hashes_of(const int64_t* tokens, int64_t V) {
  static thread_local std::vector<uint32_t> first, some;  // of the first tokens they are kept
  std::vector<uint32_t>& hashes = tokens ? some : first;
  const int64_t room = (V + LANES - 1) / LANES * LANES, known = tokens ? 0 : (int64_t)hashes.size();
  if (room > (int64_t)hashes.size()) hashes.resize(room);
  for (int64_t i = known; i < (tokens ? V : room); i++) hashes[i] = mix<uint32_t>((uint32_t)(tokens ? tokens[i] : i) + 0x85ebca6bu, 0);
  return hashes.data();
}

int64_t drawn(const Row& row, const uint32_t* hashes, int64_t V, int64_t seed, int64_t position, float* most) {
  const uint32_t low = (uint32_t)seed, high = (uint32_t)((uint64_t)seed >> 32), at = (uint32_t)position;
  const uint32_t s = mix<uint32_t>(mix<uint32_t>(low, 0) ^ high, 0), t = mix<uint32_t>(s ^ low, 0);
  const uint32_t first = mix<uint32_t>(s ^ mix<uint32_t>(at + 0x9e3779b9u, 0), 0);
  const uint32_t second = mix<uint32_t>(t ^ mix<uint32_t>(at + 0xc2b2ae35u, 0), 0);
  return winner(row, hashes, V, first, second, most);
}

// V numbers per thread, with room for whole vectors.
float* scratch(int64_t V) {
  static thread_local std::vector<float> numbers;
  if ((int64_t)numbers.size() < V + LANES) numbers.resize(V + LANES);
  return numbers.data();
}

}  // namespace

void draw(const float* scores, const int64_t* tokens, int64_t R, int64_t V, const int64_t* seeds, const int64_t* positions,
          int64_t* columns) {
  const uint32_t* hashes = hashes_of(tokens, V);
  share(R, R * V * 8, [&](int64_t begin, int64_t end) {
    float* most = scratch(V);
    for (int64_t row = begin; row < end; row++)
      columns[row] = drawn({scores + row * V}, hashes, V, seeds[row], positions[row], most);
  }, true);
}

void sample(const float* logits, const int64_t* tokens, int64_t R, int64_t V, const double* temperatures, const int64_t* seeds,
            const int64_t* positions, int64_t* columns, float* shares) {
  const uint32_t* hashes = hashes_of(tokens, V);
  share(R, R * V * 8, [&](int64_t begin, int64_t end) {
    float* room = scratch(V);
    for (int64_t row = begin; row < end; row++) {
      const float* x = logits + row * V;
      const int64_t likeliest = columns[row] = largest(x, V);
      if (shares) shares[row] = likeliest < 0 ? 0 : 1 / weight_of(x, V, x[likeliest]);
      if (likeliest < 0 || temperatures[row] <= 0) continue;
      const float scale = 1 / std::max((float)temperatures[row], std::numeric_limits<float>::min());
      columns[row] = drawn({x, x[likeliest], scale}, hashes, V, seeds[row], positions[row], room);
    }
  }, true);
}

}  // namespace stepladder
