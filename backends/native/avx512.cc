// AVX-512 with VNNI: four products of an unsigned and a signed byte added to an int32, for 16 rows in one instruction.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

namespace dyncomp {
namespace {

#include "range.h"

typedef __m512 V;
typedef __m512i I;
typedef __m512i Weights8;
typedef __m512i Nibbles;
struct Weights4 {
  __m512i low, high;
};
constexpr int kOffset8 = 0, kTiles = 2, kTokens = 6, kRows = 6, kColumns = 4;
constexpr int64_t kAlone = 2, kEarly = 2048;
constexpr int kNear = 2;
constexpr int kGathered = 4;
constexpr bool kSplit = true;

inline V set(float x) { return _mm512_set1_ps(x); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V maximum(V a, V b) { return _mm512_max_ps(a, b); }
inline V minimum(V a, V b) { return _mm512_min_ps(a, b); }
inline V absolute(V x) { return _mm512_abs_ps(x); }
inline V nearest(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V power_of_two(V n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }
inline V if_less(V a, V b, V yes, V no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
inline V load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline V to_float(I x) { return _mm512_cvtepi32_ps(x); }

inline float largest(V x) { return _mm512_reduce_max_ps(x); }
inline float total(V x) { return _mm512_reduce_add_ps(x); }
inline void transpose(const float* const* rows, int64_t at, float* to, int64_t stride) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    const __m512 x = load(rows[i] + at), y = load(rows[i + 1] + at);
    b[i] = _mm512_unpacklo_ps(x, y), b[i + 1] = _mm512_unpackhi_ps(x, y);
  }
  const auto low = [](V x, V y) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))); };
  const auto high = [](V x, V y) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))); };
  for (int i = 0; i < 16; i += 4) {  // a[i + c]: the columns c, c + 4, c + 8, c + 12 of the rows i .. i + 3
    a[i] = low(b[i], b[i + 2]), a[i + 1] = high(b[i], b[i + 2]);
    a[i + 2] = low(b[i + 1], b[i + 3]), a[i + 3] = high(b[i + 1], b[i + 3]);
  }
  for (int c = 0; c < 4; c++) {
    const V p = _mm512_shuffle_f32x4(a[c], a[c + 4], 0x44), q = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0x44);
    const V r = _mm512_shuffle_f32x4(a[c], a[c + 4], 0xee), s = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0xee);
    store(to + c * stride, _mm512_shuffle_f32x4(p, q, 0x88));
    store(to + (c + 4) * stride, _mm512_shuffle_f32x4(p, q, 0xdd));
    store(to + (c + 8) * stride, _mm512_shuffle_f32x4(r, s, 0x88));
    store(to + (c + 12) * stride, _mm512_shuffle_f32x4(r, s, 0xdd));
  }
}

inline V load_bytes(const char* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
inline void store_bytes(char* p, V x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x))); }

inline I set_integer(int32_t x) { return _mm512_set1_epi32(x); }

inline __m512i four(const int8_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
inline Weights8 load8(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Nibbles load_nibbles(const uint8_t* p) { return load8(p); }
inline Weights4 load4(const uint8_t* p) {
  const __m512i v = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
  return {_mm512_and_si512(v, mask), _mm512_and_si512(_mm512_srli_epi16(v, 4), mask)};
}
inline Weights4 load4_unshifted(const uint8_t* p) {
  const __m512i v = _mm512_loadu_si512(p);
  return {_mm512_and_si512(v, _mm512_set1_epi8(15)), _mm512_and_si512(v, _mm512_set1_epi8(-16))};
}
inline I add_sixteenth(I c, I high) { return _mm512_add_epi32(c, _mm512_srai_epi32(high, 4)); }
inline I dot8(I c, Weights8 w, const int8_t* a) { return _mm512_dpbusd_epi32(c, w, four(a)); }
inline I dot4(I c, Weights4 w, const int8_t* a) {
  return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(c, w.low, four(a)), w.high, four(a + 4));
}

inline V dot_halves(const uint8_t* p, const int8_t* x) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
  const __m256i w = _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(v, 4), mask), _mm_and_si128(v, mask));
  const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), w, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return _mm512_zextps256_ps512(_mm256_cvtepi32_ps(sums));
}

inline void quantize_block(const float* x, int32_t middle, Block* out) {
  const V u = load(x), v = load(x + kTile);
  // As integers, so that infinities and NaNs are the largest.
  const int32_t peak = _mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_castps_si512(absolute(u)), _mm512_castps_si512(absolute(v))));
  const Range range = range_of(peak);
  const V factor = set(range.factor);
  const __m512i i = _mm512_cvtps_epi32(u * factor), j = _mm512_cvtps_epi32(v * factor);
  __m128i* to = reinterpret_cast<__m128i*>(out->codes);
  _mm_storeu_si128(to, _mm512_cvtepi32_epi8(i));
  _mm_storeu_si128(to + 1, _mm512_cvtepi32_epi8(j));
  out->scale = range.scale;
  out->correction = range.factor == 0.0f ? 0 : middle * _mm512_reduce_add_epi32(_mm512_add_epi32(i, j));
}

#include "kernel_body.h"
#include "multiply.h"
#include "float_body.h"
#include "attention_body.h"

struct Lanes {
  __m512i v[4];
};
// 16 bytes of each of four inputs -> four times 4 rows, in each part of 128 bits.
inline Lanes interleave(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
  const __m512i ab2 = _mm512_unpackhi_epi8(a, b), cd2 = _mm512_unpackhi_epi8(c, d);
  return {{_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd), _mm512_unpacklo_epi16(ab2, cd2), _mm512_unpackhi_epi16(ab2, cd2)}};
}
inline Lanes lanes(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
  return interleave(_mm512_loadu_si512(a), _mm512_loadu_si512(b), _mm512_loadu_si512(c), _mm512_loadu_si512(d));
}
inline __m512i load_32_bytes(const uint8_t* p) { return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Lanes half_lanes(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
  return interleave(load_32_bytes(a), load_32_bytes(b), load_32_bytes(c), load_32_bytes(d));
}
inline Weights8 codes(const Lanes& l, int p) { return l.v[p]; }
inline Nibbles low(const Lanes& l, int p) { return _mm512_and_si512(l.v[p], _mm512_set1_epi8(15)); }
inline Nibbles high(const Lanes& l, int p) { return _mm512_and_si512(_mm512_srli_epi16(l.v[p], 4), _mm512_set1_epi8(15)); }
inline I halves(I a, I b) { return _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1); }
inline void store_lanes(const Lanes& l, uint8_t* p) {
  for (int i = 0; i < 4; i++) _mm512_store_si512(p + i * 64, l.v[i]);
}
inline int64_t compress(const int8_t* codes, int32_t stride, int32_t* offsets, int8_t* values) {
  const __m512i positions = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t n = 0;
  for (int i = 0; i < kBlock; i += kTile) {
    const __m512i v = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
    const __mmask16 kept = _mm512_test_epi32_mask(v, v);
    const __m512i at = _mm512_mullo_epi32(_mm512_add_epi32(positions, _mm512_set1_epi32(i)), _mm512_set1_epi32(stride));
    _mm512_storeu_si512(offsets + n, _mm512_maskz_compress_epi32(kept, at));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(values + n), _mm512_cvtepi32_epi8(_mm512_maskz_compress_epi32(kept, v)));
    n += __builtin_popcount(kept);
  }
  return n;
}
inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

#include "gather_body.h"

}  // namespace

const Kernels avx512_kernels = {"avx512", quantize, linear, peak, refine, expand, contract, expand_floats, contract_floats, route, decode,
    decode_lower, append, attend, gather_one, gather_many, gate, keep_large};

}  // namespace dyncomp
#endif
