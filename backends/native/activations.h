// Activation functions of 16 floats. Included by kernel_body.h; `V` and the functions on it come from the instruction set's file.
//
// Errors are relative, against exact arithmetic, for results that are normal numbers and |x| <= 20.
// A NaN stays a NaN: maximum(c, x) and minimum(c, x) give x when x is one.

// e^x - 1 = 2^n p + (2^n - 1) and e^x = 2^n p + 2^n, with p = e^r - 1 by its Taylor series, |r| <= ln(2) / 2.
struct Exponent {
  V p, power;
};
inline Exponent exponent(V x) {
  x = minimum(set(88.3f), maximum(set(-87.3f), x));
  V n = nearest(x * set(1.44269504f));
  V r = fma(n, set(-0.693359375f), x);
  r = fma(n, set(2.12194440e-4f), r);
  V q = fma(r, set(1.0f / 5040), set(1.0f / 720));
  q = fma(q, r, set(1.0f / 120));
  q = fma(q, r, set(1.0f / 24));
  q = fma(q, r, set(1.0f / 6));
  q = fma(q, r, set(0.5f));
  return {fma(q, r * r, r), power_of_two(n)};
}
inline V exp(V x) {  // error <= 2e-7
  Exponent e = exponent(x);
  return fma(e.power, e.p, e.power);
}
inline V expm1(V x) {  // error <= 3e-7
  Exponent e = exponent(x);
  return fma(e.power, e.p, e.power - set(1.0f));
}
inline V sigmoid(V x) { return set(1.0f) / (set(1.0f) + exp(set(0.0f) - x)); }  // error <= 4e-7
inline V tanh(V x) {  // error <= 5e-7
  V e = expm1(absolute(x) * set(-2.0f));
  V y = (set(0.0f) - e) / (set(2.0f) + e);
  return if_less(x, set(0.0f), set(0.0f) - y, y);
}
inline V erfc(V square, V z) {  // of z >= 0, square = z * z; error <= 1e-6 (a fit of W. Press et al., fractional error 1.2e-7)
  V t = set(1.0f) / fma(z, set(0.5f), set(1.0f));
  V q = fma(t, set(0.17087277f), set(-0.82215223f));
  q = fma(q, t, set(1.48851587f));
  q = fma(q, t, set(-1.13520398f));
  q = fma(q, t, set(0.27886807f));
  q = fma(q, t, set(-0.18628806f));
  q = fma(q, t, set(0.09678418f));
  q = fma(q, t, set(0.37409196f));
  q = fma(q, t, set(1.00002368f));
  q = fma(q, t, set(-1.26551223f));
  return t * exp(q - square);
}
inline V gelu(V x) {  // error <= 2e-6
  V half = erfc(x * x * set(0.5f), absolute(x) * set(0.70710678f)) * set(0.5f);
  return x * if_less(x, set(0.0f), half, set(1.0f) - half);
}
inline V softplus(V x) {  // max(x, 0) + log(1 + e^-|x|), the logarithm as 2 artanh(s); error <= 5e-7
  V e = exp(set(0.0f) - absolute(x));
  V s = e / (set(2.0f) + e), s2 = s * s;
  V q = fma(s2, set(1.0f / 15), set(1.0f / 13));
  q = fma(q, s2, set(1.0f / 11));
  q = fma(q, s2, set(1.0f / 9));
  q = fma(q, s2, set(1.0f / 7));
  q = fma(q, s2, set(1.0f / 5));
  q = fma(q, s2, set(1.0f / 3));
  return maximum(set(0.0f), x) + set(2.0f) * fma(q, s2 * s, s);
}
inline V mish(V x) {  // x tanh(softplus(x)) = x n / (n + 2) with n = e^x (e^x + 2); error <= 6e-7
  V w = exp(minimum(set(20.0f), x)), n = w * (w + set(2.0f));
  return x * (n / (n + set(2.0f)));
}

// In place on `count` floats, a multiple of 16. The codes are those of ACTIVATION_CODES in __init__.py.
template <typename Function>
inline void apply(float* x, int count, Function function) {
  for (int i = 0; i < count; i += kTile) store(x + i, function(load(x + i)));
}
inline void activate(int code, float* x, int count) {
  const V zero = set(0.0f);
  switch (code) {
    case 0: return;
    case 1: return apply(x, count, [=](V v) { return maximum(zero, v); });
    case 2: return apply(x, count, [=](V v) { return v / (set(1.0f) + exp(zero - v)); });
    case 3: return apply(x, count, [](V v) { return gelu(v); });
    case 4:  // x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
      return apply(x, count, [](V v) { return v * sigmoid(v * fma(v * v, set(0.0713548163f), set(1.59576912f))); });
    case 5: return apply(x, count, [](V v) { return v * sigmoid(v * set(1.702f)); });
    case 6: return apply(x, count, [=](V v) { V r = maximum(zero, v); return r * r; });
    case 7: return apply(x, count, [](V v) { return sigmoid(v); });
    case 8: return apply(x, count, [](V v) { return tanh(v); });
    case 9: return apply(x, count, [](V v) { return mish(v); });
    case 10: return apply(x, count, [=](V v) { return if_less(zero, v, v, expm1(v)); });
    case 11: return apply(x, count, [](V v) { return softplus(v); });
    case 12:
      return apply(x, count, [=](V v) {
        return v * minimum(set(6.0f), maximum(zero, v + set(3.0f))) * set(1.0f / 6);
      });
    case 13: return apply(x, count, [=](V v) { return if_less(v, zero, v * set(0.01f), v); });
    case 14:
      return apply(x, count, [=](V v) { return set(1.05070099f) * if_less(zero, v, v, set(1.67326324f) * expm1(v)); });
  }
}
