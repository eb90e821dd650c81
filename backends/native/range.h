// How a block of activations is quantized. Included inside an anonymous namespace by the file of each instruction set.

struct Range {
  float factor, scale;  // code = round(x * factor), x = scale * code
};

// `peak`: the bits of the largest magnitude; those of an infinity or a NaN are 0x7f800000 or more.
inline Range range_of(int32_t peak) {
  float most;
  __builtin_memcpy(&most, &peak, 4);
  if (peak >= 0x7f800000) return {0.0f, __builtin_nanf("")};
  if (most < 1e-35f) return {0.0f, 0.0f};  // 127 / most would be infinite
  return {127.0f / most, most / 127.0f};
}
