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
template <class F, class I, class U> static inline F bound(U bits) {
  F v;
  if constexpr (std::is_same_v<F, float>) v = (float)~bits + 0.5f;
  else v = __builtin_convertvector(~bits, F) + 0.5f;
  I exponent;
  memcpy(&exponent, &v, sizeof v);
  if constexpr (std::is_same_v<F, float>) return 0.69314718f * (159.0f - (float)exponent * 0x1p-23f);
  else return 0.69314718f * (159.0f - __builtin_convertvector(exponent, F) * 0x1p-23f);
}

float noise(uint32_t bits) { return (float)-std::log(-std::log((bits + 0.5) / 4294967296.0)); }

// The column of one row that wins; UNDECIDED if a score is no number, or if two are so close that how the noise is rounded
// decides.
int64_t winner(const float* scores, const uint32_t* hashes, int64_t V, uint32_t first, uint32_t second, float* most) {
  vec highest = all(-std::numeric_limits<float>::infinity());
  ivec broken{};
  const uvec f = uvec{} + first, s = uvec{} + second;
  int64_t i = 0;
  for (; i + LANES <= V; i += LANES) {
    uvec token;
    memcpy(&token, hashes + i, sizeof token);
    vec score = load(scores + i), value = score + bound<vec, ivec>(mix<uvec>(token ^ f, s));
    broken |= score != score;
    highest = value > highest ? value : highest;
    memcpy(most + i, &value, sizeof value);
  }
  float best = -std::numeric_limits<float>::infinity();
  for (int lane = 0; lane < LANES; lane++) {
    if (broken[lane]) return UNDECIDED;
    best = std::max(best, highest[lane]);
  }
  for (; i < V; i++) {
    if (scores[i] != scores[i]) return UNDECIDED;
    most[i] = scores[i] + bound<float, int32_t>(mix<uint32_t>(hashes[i] ^ first, second));
    best = std::max(best, most[i]);
  }
  if (!std::isfinite(best)) return UNDECIDED;
  // What the likeliest of them really comes to is a bar that nobody below can win over.
  const auto exact = [&](int64_t i) { return scores[i] + noise(mix<uint32_t>(hashes[i] ^ first, second)); };
  int64_t won = std::find(most, most + V, best) - most;
  float reached = exact(won), next = -std::numeric_limits<float>::infinity();
  const float bar = reached - SLACK;
  const auto contend = [&](int64_t i) {
    if (most[i] < bar || i == won) return;
    const float value = exact(i);
    if (value > reached) {
      next = reached, reached = value, won = i;
    } else {
      next = std::max(next, value);
    }
  };
  const vec bars = all(bar);
  const int64_t first_won = won;
  for (i = 0; i + LANES <= V; i += LANES) {
    ivec over = load(most + i) >= bars;
    int32_t any = 0;
    for (int lane = 0; lane < LANES; lane++) any |= over[lane];
    if (any)
      for (int lane = 0; lane < LANES; lane++)
        if (i + lane != first_won) contend(i + lane);
  }
  for (; i < V; i++)
    if (i != first_won) contend(i);
  return next < reached - SLACK ? won : UNDECIDED;
}

}  // namespace

void draw(const float* scores, const int64_t* tokens, int64_t R, int64_t V, const int64_t* seeds, const int64_t* positions,
          int64_t* columns) {
  std::vector<uint32_t> hashes(V);
  for (int64_t i = 0; i < V; i++) hashes[i] = mix<uint32_t>((uint32_t)(tokens ? tokens[i] : i) + 0x85ebca6bu, 0);
  share(R, R * V * 8, [&](int64_t begin, int64_t end) {
    std::vector<float> most(V);
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
