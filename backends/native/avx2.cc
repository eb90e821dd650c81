// AVX2 with FMA and F16C. Its byte products saturate at 16 bits, so 8-bit codes are made signed (minus 128) and multiplied as
// |w| * (a with the sign of w): at most 2 * 128 * 127 = 32512 for a pair, which is exact.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

namespace dyncomp {
namespace {

#include "range.h"

struct V {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};
struct Weights8 {
  I size, sign;
};
struct Weights4 {
  I low, high;
};
struct Nibbles {
  I codes;
};
constexpr int kOffset8 = 128, kTiles = 1, kTokens = 4, kRows = 6, kColumns = 1;
constexpr int64_t kAlone = 0, kEarly = 2048;
constexpr int kNear = 3;
constexpr int kGathered = 1;
constexpr bool kSplit = false;

inline V operator+(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline V operator-(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline V operator*(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V operator/(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline V set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, V x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline V maximum(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline V minimum(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline V absolute(V x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline V nearest(V x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline V power_of_two(V n) { return {power_of_two(n.a), power_of_two(n.b)}; }
inline V if_less(V x, V y, V yes, V no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
inline V load_half(const uint16_t* p) {
  const __m128i* v = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(v)), _mm256_cvtph_ps(_mm_loadu_si128(v + 1))};
}
inline V to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

inline float largest(V x) {
  const __m256 m = _mm256_max_ps(x.a, x.b);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1)), two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline float total(V x) {
  const __m256 s = _mm256_add_ps(x.a, x.b);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline void transpose8(const float* const* rows, int64_t at, float* to, int64_t stride) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    const __m256 x = _mm256_loadu_ps(rows[i] + at), y = _mm256_loadu_ps(rows[i + 1] + at);
    b[i] = _mm256_unpacklo_ps(x, y), b[i + 1] = _mm256_unpackhi_ps(x, y);
  }
  for (int i = 0; i < 8; i += 4) {  // a[i + c]: the columns c and c + 4 of the rows i .. i + 3
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44), a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44), a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int c = 0; c < 4; c++) {
    _mm256_storeu_ps(to + c * stride, _mm256_permute2f128_ps(a[c], a[c + 4], 0x20));
    _mm256_storeu_ps(to + (c + 4) * stride, _mm256_permute2f128_ps(a[c], a[c + 4], 0x31));
  }
}
inline void transpose(const float* const* rows, int64_t at, float* to, int64_t stride) {
  for (int i = 0; i < 16; i += 8) {
    transpose8(rows + i, at, to + i, stride);
    transpose8(rows + i, at + 8, to + 8 * stride + i, stride);
  }
}

inline V load_bytes(const char* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)))};
}
inline void store_bytes(char* p, V x) {
  const __m256i mixed = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));  // a0..3 b0..3, a4..7 b4..7
  const __m256i ordered = _mm256_permute4x64_epi64(mixed, 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
}

inline I set_integer(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }

inline __m256i four(const int8_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return _mm256_set1_epi32(x);
}
inline I load_codes(const uint8_t* p) {
  const __m256i* v = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
}
inline Weights8 signed_codes(__m256i a, __m256i b) {
  const __m256i flip = _mm256_set1_epi8(-128);
  a = _mm256_xor_si256(a, flip), b = _mm256_xor_si256(b, flip);
  return {{_mm256_abs_epi8(a), _mm256_abs_epi8(b)}, {a, b}};
}
inline Weights8 load8(const uint8_t* p) {
  const I v = load_codes(p);
  return signed_codes(v.a, v.b);
}
inline Nibbles load_nibbles(const uint8_t* p) { return {load_codes(p)}; }
inline Weights4 nibbles_of(I v) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {{_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask)},
          {_mm256_and_si256(_mm256_srli_epi16(v.a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(v.b, 4), mask)}};
}
inline Weights4 load4(const uint8_t* p) { return nibbles_of(load_codes(p)); }
inline __m256i add_pairs(__m256i c, __m256i pairs) { return _mm256_add_epi32(c, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))); }
inline I dot8(I c, Weights8 w, const int8_t* p) {
  const __m256i a = four(p);
  return {add_pairs(c.a, _mm256_maddubs_epi16(w.size.a, _mm256_sign_epi8(a, w.sign.a))),
          add_pairs(c.b, _mm256_maddubs_epi16(w.size.b, _mm256_sign_epi8(a, w.sign.b)))};
}
inline I dot8(I c, Nibbles w, const int8_t* p) {
  const __m256i a = four(p);
  return {add_pairs(c.a, _mm256_maddubs_epi16(w.codes.a, a)), add_pairs(c.b, _mm256_maddubs_epi16(w.codes.b, a))};
}
inline I dot4(I c, Weights4 w, const int8_t* p) {  // four products of 15 * 127 fit into 16 bits
  const __m256i low = four(p), high = four(p + 4);
  return {add_pairs(c.a, _mm256_add_epi16(_mm256_maddubs_epi16(w.low.a, low), _mm256_maddubs_epi16(w.high.a, high))),
          add_pairs(c.b, _mm256_add_epi16(_mm256_maddubs_epi16(w.low.b, low), _mm256_maddubs_epi16(w.high.b, high)))};
}

inline V dot_halves(const uint8_t* p, const int8_t* x) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
  const __m256i w = _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(v, 4), mask), _mm_and_si128(v, mask));
  const __m256i pairs = _mm256_maddubs_epi16(w, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return {_mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))), _mm256_setzero_ps()};
}

inline void quantize_block(const float* x, int32_t middle, Block* out) {
  alignas(32) int32_t lanes[8];
  const V u = load(x), v = load(x + kTile), au = absolute(u), av = absolute(v);
  // As integers, so that infinities and NaNs are the largest.
  const __m256i p = _mm256_max_epi32(_mm256_castps_si256(au.a), _mm256_castps_si256(au.b));
  const __m256i q = _mm256_max_epi32(_mm256_castps_si256(av.a), _mm256_castps_si256(av.b));
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_max_epi32(p, q));
  int32_t peak = 0;
  for (int i = 0; i < 8; i++) peak = lanes[i] > peak ? lanes[i] : peak;
  const Range range = range_of(peak);
  const V factor = set(range.factor), s = u * factor, t = v * factor;
  const __m256i i0 = _mm256_cvtps_epi32(s.a), i1 = _mm256_cvtps_epi32(s.b), i2 = _mm256_cvtps_epi32(t.a), i3 = _mm256_cvtps_epi32(t.b);
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(i0, i1), _mm256_packs_epi32(i2, i3));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out->codes),
                      _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
  out->scale = range.scale;
  out->correction = 0;
  if (range.factor == 0.0f) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out->codes), _mm256_setzero_si256());
    return;
  }
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi32(_mm256_add_epi32(i0, i1), _mm256_add_epi32(i2, i3)));
  for (int i = 0; i < 8; i++) out->correction += middle * lanes[i];
}

#include "kernel_body.h"
#include "multiply.h"
#include "float_body.h"
#include "attention_body.h"

struct Lanes {
  __m256i v[2][4];  // of the first and the last 32 rows: four times 4 rows in each part of 128 bits
};
inline void interleave(__m256i a, __m256i b, __m256i c, __m256i d, __m256i* out) {
  const __m256i ab = _mm256_unpacklo_epi8(a, b), cd = _mm256_unpacklo_epi8(c, d);
  const __m256i ab2 = _mm256_unpackhi_epi8(a, b), cd2 = _mm256_unpackhi_epi8(c, d);
  out[0] = _mm256_unpacklo_epi16(ab, cd), out[1] = _mm256_unpackhi_epi16(ab, cd);
  out[2] = _mm256_unpacklo_epi16(ab2, cd2), out[3] = _mm256_unpackhi_epi16(ab2, cd2);
}
inline Lanes half_lanes(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
  const auto load32 = [](const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
  Lanes l = {};
  interleave(load32(a), load32(b), load32(c), load32(d), l.v[0]);
  return l;
}
inline Lanes lanes(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
  Lanes l = half_lanes(a, b, c, d);
  const Lanes last = half_lanes(a + 32, b + 32, c + 32, d + 32);
  for (int p = 0; p < 4; p++) l.v[1][p] = last.v[0][p];
  return l;
}
inline void store_lanes(const Lanes& l, uint8_t* p) {
  for (int i = 0; i < 8; i++) _mm256_store_si256(reinterpret_cast<__m256i*>(p) + i, l.v[i % 2][i / 2]);
}
inline Weights8 codes(const Lanes& l, int p) { return signed_codes(l.v[0][p], l.v[1][p]); }
inline Nibbles low(const Lanes& l, int p) { return {nibbles_of({l.v[0][p], l.v[1][p]}).low}; }
inline Nibbles high(const Lanes& l, int p) { return {nibbles_of({l.v[0][p], l.v[1][p]}).high}; }
inline I halves(I a, I b) { return {a.a, b.a}; }
inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

#include "compress.h"
#include "gather_body.h"

}  // namespace

const Kernels avx2_kernels = {"avx2", quantize, linear, peak, refine, expand, contract, expand_floats, contract_floats, route, decode,
    decode_lower, append, attend, gather_one, gather_many, gate, keep_large};

}  // namespace dyncomp
#endif
