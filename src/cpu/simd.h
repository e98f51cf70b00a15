// Vectors of kLanes floats on the compiler's vector extensions, so that one source serves every
// instruction set.
//
// Included by kernels_<isa>.cpp alone, which define FLASH_MLA_CPU_LANES first. Everything is in an
// unnamed namespace, and no inline function of the standard library may be used here: the linker
// keeps one copy of such a function for the whole library, and that copy may hold instructions that
// the machine lacks.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define FLASH_MLA_INLINE [[gnu::always_inline]] inline

namespace flash_mla::cpu {
namespace {

constexpr int kLanes = FLASH_MLA_CPU_LANES;
constexpr float kInfinity = __builtin_inff();

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t BitVec __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t HalfBitVec __attribute__((vector_size(kLanes * 2)));

// Storage types of the three dtypes.
struct Bf16 {
  std::uint16_t bits;
};
struct Fp16 {
  std::uint16_t bits;
};
using Fp32 = float;

FLASH_MLA_INLINE Vec splat(float x) { return Vec{} + x; }
FLASH_MLA_INLINE Vec as_floats(BitVec bits) { return reinterpret_cast<Vec>(bits); }
FLASH_MLA_INLINE BitVec as_bits(Vec x) { return reinterpret_cast<BitVec>(x); }
FLASH_MLA_INLINE Vec max(Vec x, Vec y) { return x > y ? x : y; }

template <class V>
FLASH_MLA_INLINE V load_raw(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

FLASH_MLA_INLINE Vec load(const Fp32* from) { return load_raw<Vec>(from); }

FLASH_MLA_INLINE Vec load(const Bf16* from) {
  return as_floats(__builtin_convertvector(load_raw<HalfBitVec>(from), BitVec) << 16);
}

FLASH_MLA_INLINE Vec load(const Fp16* from) {
#if defined(__F16C__) && FLASH_MLA_CPU_LANES == 8
  return _mm256_cvtph_ps(load_raw<__m128i>(from));
#elif defined(__AVX512F__) && FLASH_MLA_CPU_LANES == 16
  // NOTE: the form without a mask makes GCC 12 warn of an uninitialised value in its own header
  // (GCC bug 105593).
  return _mm512_maskz_cvtph_ps(0xffff, load_raw<__m256i>(from));
#else
  const BitVec half = __builtin_convertvector(load_raw<HalfBitVec>(from), BitVec);
  // Moves the exponent's bias from 15 to 127 by a multiplication, which also makes subnormals
  // normal.
  const BitVec finite = as_bits(as_floats((half & 0x7fff) << 13) * 0x1p112f);
  const BitVec magnitude = (half & 0x7c00) == 0x7c00 ? finite | 0x7f800000 : finite;
  return as_floats(magnitude | (half & 0x8000) << 16);
#endif
}

FLASH_MLA_INLINE void store(Fp32* to, Vec x) { std::memcpy(to, &x, sizeof x); }

FLASH_MLA_INLINE void store(Bf16* to, Vec x) {
  const BitVec bits = as_bits(x);
  const BitVec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  const BitVec quiet_nan = bits >> 16 | 0x40;
  const HalfBitVec half = __builtin_convertvector(x == x ? rounded : quiet_nan, HalfBitVec);
  std::memcpy(to, &half, sizeof half);
}

FLASH_MLA_INLINE void store(Fp16* to, Vec x) {
#if defined(__F16C__) && FLASH_MLA_CPU_LANES == 8
  const __m128i half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX512F__) && FLASH_MLA_CPU_LANES == 16
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT);
#else
  const BitVec bits = as_bits(x);
  const BitVec magnitude = bits & 0x7fffffff;
  const BitVec normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // Adding 0.5 leaves a subnormal result, rounded, in the low bits.
  const BitVec subnormal = as_bits(as_floats(magnitude) + 0.5f) - 0x3f000000;
  const BitVec nan = (magnitude >> 13 & 0x3ff) | 0x7e00;
  const BitVec finite = magnitude < 0x38800000 ? subnormal : normal;
  const BitVec unsigned_half = magnitude > 0x7f800000    ? nan
                               : magnitude >= 0x477ff000 ? BitVec{} + 0x7c00
                                                         : finite;
  const HalfBitVec half =
      __builtin_convertvector(unsigned_half | (bits >> 16 & 0x8000), HalfBitVec);
#endif
  std::memcpy(to, &half, sizeof half);
}

template <int kWidth>
struct FloatsOf {
  typedef float Type __attribute__((vector_size(kWidth * 4)));
};

// Sum of all lanes, by halving.
template <int kWidth = kLanes>
FLASH_MLA_INLINE float sum(typename FloatsOf<kWidth>::Type x) {
  if constexpr (kWidth == 4) {
    return (x[0] + x[2]) + (x[1] + x[3]);
  } else {
    typename FloatsOf<kWidth / 2>::Type halves[2];
    std::memcpy(halves, &x, sizeof x);
    return sum<kWidth / 2>(halves[0] + halves[1]);
  }
}

// The largest lane; lanes that are NaN may be passed over.
FLASH_MLA_INLINE float max_lane(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  float largest = lanes[0];
  for (int i = 1; i < kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

// 2 ** x for x <= 0, to 2 units in the last place; 0 below the normal numbers, NaN for NaN.
FLASH_MLA_INLINE Vec exp2(Vec x) {
  const Vec clamped = x < -126.f ? splat(-126.f) : x;
  const Vec shifter = splat(0x1.8p23f);  // adding it rounds to an integer
  const Vec whole = (clamped + shifter) - shifter;
  const Vec fraction = clamped - whole;  // -0.5 .. 0.5
  // Taylor series: ln(2) ** k / k!.
  Vec y = splat(1.5252734e-5f);
  y = y * fraction + 1.5403530e-4f;
  y = y * fraction + 1.3333558e-3f;
  y = y * fraction + 9.6181291e-3f;
  y = y * fraction + 5.5504109e-2f;
  y = y * fraction + 2.4022651e-1f;
  y = y * fraction + 6.9314718e-1f;
  y = y * fraction + 1.f;
  // The low bits of the shifted number hold the integer.
  const BitVec power = (as_bits(clamped + shifter) - as_bits(shifter) + 127) << 23;
  return x < -126.f ? Vec{} : y * as_floats(power);
}

FLASH_MLA_INLINE float exp2(float x) { return exp2(splat(x))[0]; }

}  // namespace
}  // namespace flash_mla::cpu
