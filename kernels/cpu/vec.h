// Vectors of this machine's own width, in the compiler's vector types: one source for AVX-512, AVX2 and Arm.
#pragma once
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace stepladder {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t half_vec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

// How a number lies in memory; all arithmetic is in fp32.
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

static inline vec all(float x) { return x - vec{}; }

// a b + c, rounded once, or twice where the machine cannot; a number and a vector of them alike. Compilers are told not to
// do so by themselves (-ffp-contract=off): they would where it looks faster, in one shape of a tile and not in another.
#if defined(__AVX512F__)
static inline vec fma(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__AVX__) && defined(__FMA__)
static inline vec fma(vec a, vec b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(__aarch64__)
static inline vec fma(vec a, vec b, vec c) { return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
static inline vec fma(vec a, vec b, vec c) { return a * b + c; }
#endif
#if defined(__FMA__) || defined(__aarch64__)
static inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
#else
static inline float fma(float a, float b, float c) { return a * b + c; }
#endif

static inline vec load(const float* p) { return *(const vec*)p; }
static inline vec load(const bf16* p) { return (vec)(__builtin_convertvector(*(const half_vec*)p, uvec) << 16); }
static inline vec load(const fp16* p) {  // exponent and mantissa moved into place, then the bias of 15 made one of 127
  uvec bits = __builtin_convertvector(*(const half_vec*)p, uvec);
  vec magnitude = (vec)((bits & 0x7fff) << 13) * 0x1p112f;
  return (vec)((uvec)magnitude | (bits & 0x8000) << 16);
}

static inline float widen(float x) { return x; }
static inline float widen(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
static inline float widen(fp16 x) { return c10::detail::fp16_ieee_to_fp32_value(x.bits); }

static inline void narrow(float x, float* p) { *p = x; }
static inline void narrow(float x, bf16* p) {  // to nearest, ties to even, as torch
  uint32_t bits;
  memcpy(&bits, &x, 4);
  p->bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static inline void narrow(float x, fp16* p) { p->bits = c10::detail::fp16_ieee_from_fp32_value(x); }

// n numbers from one form into another
template <class From, class To> static inline void convert(const From* from, To* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) narrow(widen(from[i]), to + i);
}

static inline float sum_of(vec x) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}

// e^x within 2 ulp: 2^n e^r with |r| <= ln(2) / 2 (Cody and Waite's reduction, the polynomial of Cephes' expf).
// Exactly 0 from -87 down, so that a masked score of minus infinity weighs nothing.
static inline vec exponential(vec x) {
  const vec high = all(88.0f), magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  vec y = x > high ? high : x;
  y = y < all(-87.0f) ? all(-87.0f) : y;
  vec n = fma(y, all(1.44269504088896341f), magic) - magic;
  vec r = fma(n, all(-0.693359375f), y);
  r = fma(n, all(2.12194440e-4f), r);
  vec p = all(1.9875691500e-4f);
  for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fma(p, r, all(next));
  p = fma(p * r, r, r) + 1.0f;
  ivec exponent = (__builtin_convertvector(n, ivec) + 127) << 23;
  return x < all(-87.0f) ? vec{} : p * (vec)exponent;
}

}  // namespace stepladder
