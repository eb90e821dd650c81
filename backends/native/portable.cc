// Plain C++ with the vector extensions of GCC and Clang, for any processor.
#include "kernels.h"

#define UNROLL  // the compiler's own choice: there may be few registers

namespace dyncomp {
namespace {

#include "range.h"

typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
struct Weights8 {
  const uint8_t* codes;
};
typedef Weights8 Nibbles;
struct Weights4 {
  const uint8_t* codes;
};
constexpr int kOffset8 = 0, kTiles = 1, kTokens = 4, kRows = 3, kColumns = 1;
constexpr int64_t kAlone = 0, kEarly = 0;
constexpr int kNear = 3;
constexpr int kGathered = 4;
constexpr bool kSplit = false;

inline V set(float x) { return V{} + x; }
inline V load(const float* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, V x) { __builtin_memcpy(p, &x, sizeof x); }
inline V fma(V a, V b, V c) { return a * b + c; }
inline V if_less(V a, V b, V yes, V no) { return a < b ? yes : no; }
inline V maximum(V a, V b) { return a > b ? a : b; }
inline V minimum(V a, V b) { return a < b ? a : b; }
inline V absolute(V x) { return reinterpret_cast<V>(reinterpret_cast<I>(x) & 0x7fffffff); }
inline I to_integer(V x) { return __builtin_convertvector(x, I); }
inline V to_float(I x) { return __builtin_convertvector(x, V); }
inline V nearest(V x) {  // to even, for |x| < 2^22
  const V magic = set(12582912.0f);
  return (x + magic) - magic;
}
inline V power_of_two(V n) { return reinterpret_cast<V>((to_integer(n) + 127) << 23); }

inline float half(uint16_t bits) {
  const int32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 0) return sign * static_cast<float>(fraction) * 0x1p-24f;
  const int32_t wide = exponent == 31 ? 0x7f800000 | fraction << 13 : (exponent + 112) << 23 | fraction << 13;
  float x;
  __builtin_memcpy(&x, &wide, sizeof x);
  return sign * x;
}
inline V load_half(const uint16_t* p) {
  V x;
  for (int i = 0; i < kTile; i++) x[i] = half(p[i]);
  return x;
}

inline float largest(V x) {
  float y = x[0];
  for (int i = 1; i < kTile; i++) y = x[i] > y ? x[i] : y;
  return y;
}
inline float total(V x) {
  float y = 0.0f;
  for (int i = 0; i < kTile; i++) y += x[i];
  return y;
}
inline void transpose(const float* const* rows, int64_t at, float* to, int64_t stride) {
  for (int i = 0; i < kTile; i++) {
    for (int j = 0; j < kTile; j++) to[j * stride + i] = rows[i][at + j];
  }
}

inline V load_bytes(const char* p) {
  V x;
  for (int i = 0; i < kTile; i++) x[i] = static_cast<float>(static_cast<int8_t>(p[i]));
  return x;
}
inline void store_bytes(char* p, V x) {
  const I codes = to_integer(nearest(x));
  for (int i = 0; i < kTile; i++) p[i] = static_cast<char>(codes[i]);
}

inline I set_integer(int32_t x) { return I{} + x; }

inline Weights8 load8(const uint8_t* p) { return {p}; }
inline Nibbles load_nibbles(const uint8_t* p) { return load8(p); }
inline Weights4 load4(const uint8_t* p) { return {p}; }
inline I dot8(I c, Weights8 w, const int8_t* a) {
  for (int i = 0; i < kTile; i++) {
    const uint8_t* v = w.codes + i * 4;
    c[i] += v[0] * a[0] + v[1] * a[1] + v[2] * a[2] + v[3] * a[3];
  }
  return c;
}
inline I dot4(I c, Weights4 w, const int8_t* a) {
  for (int i = 0; i < kTile; i++) {
    const uint8_t* v = w.codes + i * 4;
    c[i] += (v[0] & 15) * a[0] + (v[1] & 15) * a[1] + (v[2] & 15) * a[2] + (v[3] & 15) * a[3];
    c[i] += (v[0] >> 4) * a[4] + (v[1] >> 4) * a[5] + (v[2] >> 4) * a[6] + (v[3] >> 4) * a[7];
  }
  return c;
}

inline V dot_halves(const uint8_t* p, const int8_t* x) {
  I sum = {};
  for (int i = 0; i < kTile; i++) sum[i] = (p[i] & 15) * x[i] + (p[i] >> 4) * x[i + 16];
  return to_float(sum);
}

inline void quantize_block(const float* x, int32_t middle, Block* out) {
  int32_t peak = 0, sum = 0;
  for (int i = 0; i < kBlock; i++) {
    int32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;  // as integers, so that infinities and NaNs are the largest
    peak = bits > peak ? bits : peak;
  }
  const Range range = range_of(peak);
  for (int i = 0; i < kBlock; i += kTile) {
    const I codes = range.factor == 0.0f ? I{} : to_integer(nearest(load(x + i) * range.factor));
    for (int j = 0; j < kTile; j++) {
      out->codes[i + j] = static_cast<int8_t>(codes[j]);
      sum += codes[j];
    }
  }
  out->scale = range.scale;
  out->correction = middle * sum;
}

#include "kernel_body.h"
#include "multiply.h"
#include "float_body.h"
#include "attention_body.h"

struct Lanes {
  uint8_t v[256];
  mutable uint8_t parts[2][256];
};
inline Lanes interleave(const uint8_t* const* in, int pieces) {
  Lanes l = {};
  for (int piece = 0; piece < pieces; piece++) {
    for (int p = 0; p < 4; p++) {
      for (int i = 0; i < 16; i++) l.v[p * 64 + piece * 16 + i] = in[i % 4][piece * 16 + p * 4 + i / 4];
    }
  }
  return l;
}
inline Lanes lanes(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
  const uint8_t* in[] = {a, b, c, d};
  return interleave(in, 4);
}
inline Lanes half_lanes(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
  const uint8_t* in[] = {a, b, c, d};
  return interleave(in, 2);
}
inline void store_lanes(const Lanes& l, uint8_t* p) { __builtin_memcpy(p, l.v, sizeof l.v); }
inline Weights8 codes(const Lanes& l, int p) { return {l.v + p * 64}; }
inline Nibbles low(const Lanes& l, int p) {
  for (int i = p * 64; i < p * 64 + 64; i++) l.parts[0][i] = l.v[i] & 15;
  return {l.parts[0] + p * 64};
}
inline Nibbles high(const Lanes& l, int p) {
  for (int i = p * 64; i < p * 64 + 64; i++) l.parts[1][i] = l.v[i] >> 4;
  return {l.parts[1] + p * 64};
}
inline I halves(I a, I b) {
  for (int i = 0; i < 8; i++) a[8 + i] = b[i];
  return a;
}
inline void prefetch(const uint8_t* p) { __builtin_prefetch(p); }

#include "compress.h"
#include "gather_body.h"

}  // namespace

const Kernels portable_kernels = {"portable", quantize, linear, peak, refine, expand, contract, expand_floats, contract_floats, route, decode,
    decode_lower, append, attend, gather_one, gather_many, gate, keep_large};

}  // namespace dyncomp
