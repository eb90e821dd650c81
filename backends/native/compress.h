// What gather_body.h calls `compress`, where no instruction does it.
inline int64_t compress(const int8_t* codes, int32_t stride, int32_t* offsets, int8_t* values) {
  int64_t n = 0;
  for (int32_t j = 0; j < kBlock; j++) {
    offsets[n] = j * stride, values[n] = codes[j];
    n += codes[j] != 0;
  }
  return n;
}
