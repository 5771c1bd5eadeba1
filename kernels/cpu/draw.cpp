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

float noise(uint32_t bits) { return (float)-std::log(-std::log((bits + 0.5) / 4294967296.0)); }

// The column of one row that wins; UNDECIDED if a score is no number, or if two are so close that how the noise is rounded
// decides. hashes, most: V numbers, with room for whole vectors; the latter is for what each column comes to at most.
int64_t winner(const float* scores, const uint32_t* hashes, int64_t V, uint32_t first, uint32_t second, float* most) {
  const vec nothing = all(-std::numeric_limits<float>::infinity());
  const uvec f = uvec{} + first, s = uvec{} + second;
  vec highest = nothing;
  ivec broken{};
  for (int64_t i = 0; i < V; i += LANES) {
    vec score = nothing;
    memcpy(&score, scores + i, 4 * std::min<int64_t>(LANES, V - i));
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
  const auto exact = [&](int64_t i) { return scores[i] + noise(mix<uint32_t>(hashes[i] ^ first, second)); };
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

}  // namespace

void draw(const float* scores, const int64_t* tokens, int64_t R, int64_t V, const int64_t* seeds, const int64_t* positions,
          int64_t* columns) {
  const int64_t room = (V + LANES - 1) / LANES * LANES;
  std::vector<uint32_t> hashes(room);
  for (int64_t i = 0; i < V; i++) hashes[i] = mix<uint32_t>((uint32_t)(tokens ? tokens[i] : i) + 0x85ebca6bu, 0);
  share(R, R * V * 8, [&](int64_t begin, int64_t end) {
    std::vector<float> most(room);
    for (int64_t row = begin; row < end; row++) {
      const uint32_t low = (uint32_t)seeds[row], high = (uint32_t)((uint64_t)seeds[row] >> 32), at = (uint32_t)positions[row];
      const uint32_t s = mix<uint32_t>(mix<uint32_t>(low, 0) ^ high, 0), t = mix<uint32_t>(s ^ low, 0);
      const uint32_t first = mix<uint32_t>(s ^ mix<uint32_t>(at + 0x9e3779b9u, 0), 0);
      const uint32_t second = mix<uint32_t>(t ^ mix<uint32_t>(at + 0xc2b2ae35u, 0), 0);
      columns[row] = winner(scores + row * V, hashes.data(), V, first, second, most.data());
    }
  }, true);
}

}  // namespace stepladder
