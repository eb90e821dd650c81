// Products with matrices stored input by input, written once. Included after kernel_body.h, by files that have also defined
//   Lanes        the codes of four inputs for 64 rows (in 4 bits, 128), each row's four side by side
//   lanes, half_lanes   from 64, or 32, bytes of each of four inputs
//   codes, low, high    of lanes: 16 rows; whole bytes as Weights8, their lower or their upper halves as Nibbles
//   Nibbles      64 codes below 16, in bytes, that dot8 takes as they are; load_nibbles
//   store_lanes  256 bytes
//   halves       the first halves of two I
//   compress     positions (times a stride) and values of the codes of a block that are not 0, and their number
//   prefetch     of the cache line at an address
//   kGathered    how many times 64 rows, in 8 bits, of an input are read together: as many as the registers hold sums for

// The inputs of a block that a product reads, in fours: where their codes begin, and the activations.
struct Fours {
  const uint8_t* base;
  alignas(64) int32_t offsets[kBlock + kTile];
  alignas(64) int8_t codes[kBlock + kTile];
  int64_t count;
};

// Those whose code is not 0; the last four are filled up with an input that is there already, times 0.
inline void gather(const InputMatrix& w, const Block& x, int64_t b, int64_t offset, Fours* out) {
  out->base = w.codes + b * kBlock * w.stride + offset;
  int64_t n = compress(x.codes, static_cast<int32_t>(w.stride), out->offsets, out->codes);
  for (; n % 4; n++) out->offsets[n] = out->offsets[n - 1], out->codes[n] = 0;
  out->count = n / 4;
}

template <int BITS>
inline void add_four(const Lanes& l, const int8_t* a, I* c) {
  UNROLL for (int p = 0; p < 4; p++) {
    if constexpr (BITS == 8) {
      c[p] = dot8(c[p], codes(l, p), a);
    } else {
      c[p] = dot8(c[p], low(l, p), a);
      c[4 + p] = dot8(c[4 + p], high(l, p), a);
    }
  }
}

// What the products of a block are multiplied with and what is added to them.
struct BlockScale {
  const uint16_t *scales, *offsets;  // of the first row
  float scale;
  int32_t total;  // of the codes of the activations
};

template <int BITS, bool OFFSETS>
inline int32_t start_of(int32_t total) {
  return ((BITS == 8 ? kOffset8 : 0) - (OFFSETS ? 0 : BITS == 8 ? 128 : 8)) * total;
}

// sums[16 * i ..] += scales * c[i], and what the offsets add, for rows from `row` on.
template <bool OFFSETS, int COUNT>
inline void add_scaled(const I* c, const BlockScale& s, int64_t row, float* sums) {
  UNROLL for (int i = 0; i < COUNT; i++) {
    const int64_t at = row + i * kTile;
    V y = fma(to_float(c[i]), load_half(s.scales + at) * set(s.scale), load(sums + at));
    if (OFFSETS) y = fma(load_half(s.offsets + at), set(s.scale * static_cast<float>(s.total)), y);
    store(sums + at, y);
  }
}

template <int BITS>
inline auto load_codes_of(const uint8_t* p) {
  if constexpr (BITS == 8) {
    return load8(p);
  } else {
    return load_nibbles(p);
  }
}

inline int32_t total_of(const int8_t* codes) {
  int32_t total = 0;
  for (int i = 0; i < kBlock; i++) total += codes[i];
  return total;
}

inline BlockScale scale_of(const InputMatrix& w, const Block& x, int64_t b, int64_t row) {
  const int64_t at = b * kBlock / w.block * w.padded + row;
  return {w.scales + at, w.offsets ? w.offsets + at : nullptr, x.scale, total_of(x.codes)};
}

template <bool HALF>
inline Lanes lanes_of(const Fours& fours, int64_t f, int64_t at) {
  const int32_t* o = fours.offsets + f * 4;
  const uint8_t* p = fours.base + at;
  return HALF ? half_lanes(p + o[0], p + o[1], p + o[2], p + o[3]) : lanes(p + o[0], p + o[1], p + o[2], p + o[3]);
}

// R times 64 bytes (HALF: 32) of codes an input, `at` bytes from the first row's; the next block's are fetched meanwhile.
template <int BITS, bool OFFSETS, int R, bool HALF>
inline void rows_of_block(const Fours& now, const Fours* next, int64_t at, const BlockScale& scale, float* sums) {
  constexpr int kParts = BITS == 8 ? 4 : 8;
  const int64_t row = at * 8 / BITS;
  I c[R][kParts];
  UNROLL for (int r = 0; r < R; r++) {
    UNROLL for (int p = 0; p < kParts; p++) c[r][p] = set_integer(start_of<BITS, OFFSETS>(scale.total));
  }
  for (int64_t f = 0; f < now.count; f++) {
    UNROLL for (int r = 0; r < R; r++) add_four<BITS>(lanes_of<HALF>(now, f, at + r * 64), now.codes + f * 4, c[r]);
    if (next && f < next->count) {
      UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int k = 0; k < 4; k++) prefetch(next->base + next->offsets[f * 4 + k] + at + r * 64);
      }
    }
  }
  if constexpr (HALF) {
    const I joined[4] = {halves(c[0][0], c[0][1]), halves(c[0][2], c[0][3]), halves(c[0][4], c[0][5]), halves(c[0][6], c[0][7])};
    add_scaled<OFFSETS, 4>(joined, scale, row, sums);
  } else {
    UNROLL for (int r = 0; r < R; r++) add_scaled<OFFSETS, kParts>(c[r], scale, row + r * kParts * kTile, sums);
  }
}

// The products with the inputs of the blocks from .. to - 1.
template <int BITS, bool OFFSETS>
void gather_rows(const GatherJob& job, int64_t first, int64_t last, int64_t from, int64_t to, float* output) {
  constexpr int kWide = BITS == 8 ? kGathered : (kGathered + 1) / 2;
  const InputMatrix& w = job.weight;
  alignas(64) float sums[kGatherRows];
  const int64_t padded = (last - first + 63) / 64 * 64, bytes = padded * BITS / 8, offset = first * BITS / 8;
  for (int64_t i = 0; i < padded; i += kTile) store(sums + i, set(0.0f));
  Fours fours[2];
  gather(w, job.blocks[from], from, offset, &fours[from % 2]);
  for (int64_t b = from; b < to; b++) {
    const Fours& now = fours[b % 2];
    Fours* next = b + 1 < to ? &fours[(b + 1) % 2] : nullptr;
    if (next) gather(w, job.blocks[b + 1], b + 1, offset, next);
    const BlockScale scale = scale_of(w, job.blocks[b], b, first);
    int64_t at = 0;
    for (; at + kWide * 64 <= bytes; at += kWide * 64) rows_of_block<BITS, OFFSETS, kWide, false>(now, next, at, scale, sums);
    for (; at + 64 <= bytes; at += 64) rows_of_block<BITS, OFFSETS, 1, false>(now, next, at, scale, sums);
    if (BITS == 4 && at < bytes) rows_of_block<4, OFFSETS, 1, true>(now, next, at, scale, sums);
  }
  for (int64_t i = first; i < last; i++) output[i] = sums[i - first];
}

// ---- many tokens ---------------------------------------------------------------------------------------------------
// A block's codes for 64 or 128 rows, as rows_of wants them: by parts of 16 rows, 8 times [16 rows x 4 inputs].
template <int BITS>
inline int64_t spread(const InputMatrix& w, int64_t b, int64_t at, bool half, uint8_t* out) {
  alignas(64) uint8_t four[256];
  for (int64_t f = 0; f < kBlock / 4; f++) {
    const uint8_t* p = w.codes + (b * kBlock + f * 4) * w.stride + at;
    store_lanes(half ? half_lanes(p, p + w.stride, p + 2 * w.stride, p + 3 * w.stride)
                     : lanes(p, p + w.stride, p + 2 * w.stride, p + 3 * w.stride), four);
    for (int part = 0; part < 4; part++) {
      const uint8_t* from = four + part * 64;
      if (BITS == 8) {
        __builtin_memcpy(out + (part * 8 + f) * 64, from, 64);
      } else if (half) {  // parts of 8 rows: two make up one
        uint8_t* to = out + (part / 2 * 8 + f) * 64 + part % 2 * 32;
        for (int i = 0; i < 32; i++) to[i] = from[i] & 15, to[2 * 512 + i] = from[i] >> 4;
      } else {
        uint8_t* to = out + (part * 8 + f) * 64;
        for (int i = 0; i < 64; i++) to[i] = from[i] & 15, to[4 * 512 + i] = from[i] >> 4;
      }
    }
  }
  return BITS == 8 || half ? 4 : 8;
}

// Adds a block's products for M tokens to their sums.
template <int BITS, bool OFFSETS, int M>
inline void add_tokens(const InputMatrix& w, const uint8_t* spread, int64_t parts, const Block* x, int64_t stride, int64_t b, int64_t row,
                       int64_t from, float* sums) {
  BlockScale scale[M];
  UNROLL for (int t = 0; t < M; t++) scale[t] = scale_of(w, x[t * stride], b, row);
  for (int64_t p = 0; p < parts; p++) {
    I c[M];
    UNROLL for (int t = 0; t < M; t++) c[t] = set_integer(start_of<BITS, OFFSETS>(scale[t].total));
    UNROLL for (int f = 0; f < kBlock / 4; f++) {
      const auto v = load_codes_of<BITS>(spread + (p * 8 + f) * 64);
      UNROLL for (int t = 0; t < M; t++) c[t] = dot8(c[t], v, x[t * stride].codes + f * 4);
    }
    UNROLL for (int t = 0; t < M; t++) add_scaled<OFFSETS, 1>(&c[t], scale[t], from + p * kTile, sums + t * kGatherTile);
  }
}

inline void begin_sums(const GatherJob& job, int64_t first, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; i++) sums[i] = job.bias && first + i < job.weight.rows ? job.bias[first + i] : 0.0f;
}

template <int BITS, bool OFFSETS>
void rows_of_tokens(const GatherJob& job, int64_t first, int64_t last, int64_t from, int64_t to) {
  const InputMatrix& w = job.weight;
  const int64_t blocks = w.columns / kBlock, padded = (last - first + 63) / 64 * 64, bytes = padded * BITS / 8;
  alignas(64) float sums[kGatherTokens][kGatherTile];
  alignas(64) uint8_t block[8 * 512];
  const auto token = [&](int64_t t) { return job.blocks + (from + t) * blocks; };
  for (int64_t t = 0; t < to - from; t++) begin_sums(job, first, padded, sums[t]);
  for (int64_t b = 0; b < blocks; b++) {
    for (int64_t at = 0; at < bytes; at += 64) {
      const int64_t row = at * 8 / BITS, parts = spread<BITS>(w, b, first * BITS / 8 + at, bytes - at < 64, block);
      int64_t t = 0;
      for (; t + kTokens <= to - from; t += kTokens) {
        add_tokens<BITS, OFFSETS, kTokens>(w, block, parts, token(t) + b, blocks, b, first, row, sums[t]);
      }
      for (; t < to - from; t++) add_tokens<BITS, OFFSETS, 1>(w, block, parts, token(t) + b, blocks, b, first, row, sums[t]);
    }
  }
  for (int64_t t = from; t < to; t++) {
    for (int64_t i = first; i < last; i++) job.output[t * w.rows + i] = sums[t - from][i - first];
  }
}

// ---- the functions of the table -----------------------------------------------------------------------------------
void gather_one(const GatherJob& job, int64_t first, int64_t last, int64_t from, int64_t to, float* output) {
  const bool offsets = job.weight.offsets != nullptr;
  const auto function = job.weight.bits == 8 ? offsets ? gather_rows<8, true> : gather_rows<8, false>
                                             : offsets ? gather_rows<4, true> : gather_rows<4, false>;
  function(job, first, last, from, to, output);
}

void gather_many(const GatherJob& job, int64_t first, int64_t last, int64_t from, int64_t to) {
  const bool offsets = job.weight.offsets != nullptr;
  const auto function = job.weight.bits == 8 ? offsets ? rows_of_tokens<8, true> : rows_of_tokens<8, false>
                                             : offsets ? rows_of_tokens<4, true> : rows_of_tokens<4, false>;
  function(job, first, last, from, to);
}

void gate(int32_t activation, float* x, int64_t neurons, float* output) {
  activate(activation, x, static_cast<int>(neurons));
  for (int64_t i = 0; i < neurons; i += kTile) store(output + i, load(x + i) * load(x + neurons + i));
}

void keep_large(const float* x, const float* thresholds, int64_t columns, float* output) {
  for (int64_t j = 0; j < columns; j++) output[j] = __builtin_fabsf(x[j]) <= thresholds[j] ? 0.0f : x[j];
}
