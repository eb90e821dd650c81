// The kernels, written once. Included inside an anonymous namespace by the file of each instruction set, after it has defined
//   V            16 floats, with + - * / and the functions used here and in activations.h
//   I            16 int32: dot products of 16 rows with one token
//   Weights8     64 codes, [16 rows x 4 columns]; Weights4: 128 codes, the columns 0..3 and 4..7 of 16 rows
//   kSplit       whether there is load4_unshifted, whose upper codes are 16 times too large
//   kOffset8     what Weights8 has subtracted from the codes (0, or 128 where products are of signed numbers)
//   kTiles, kTokens   tiles of rows and tokens that share a pass over the weights: as many as the registers hold sums for
//   kAlone       up to how many tokens tiles are read one after the other instead: weights then come from memory in one stream, which the
//                processor's own prefetching follows best
//   kEarly, kNear   how many bytes before it reads them a product for one or two tokens asks for weights, which come from memory and in
//                order: that prefetching begins anew with every page. 0 where it was not found to help. kNear: into which cache (3: the first)
//   kRows, kColumns   the same for products of floats: rows, and vectors of 16 columns
//   total        the sum of the 16 floats of a V
//   dot_halves   16 sums that make up the product of 32 codes of 4 bits, as LowerHalves has them, with 32 activations
// No library function is called here: this is compiled with flags that other code must not see.

#include "activations.h"

#if defined(UNROLL)
#elif defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

// Asks for memory that is read soon: from DRAM it comes while something else is computed.
inline void fetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- the inner loop -----------------------------------------------------------------------------------------------
// out[t][r * 16 ..] = rows of the tiles tile .. tile + R - 1 for the tokens rows[0 .. M - 1] of x; or they are added to it.
template <int BITS, bool OFFSETS, int R, int M>
void product(const Matrix& w, int64_t tile, const Block* x, const int32_t* rows, float* const* out, bool add) {
  const int64_t blocks = w.columns / kBlock, groups = w.columns / w.block, share = w.block / kBlock;
  const int64_t bytes = BITS * kTile * kBlock / 8;  // of a tile's block
  // With registers to spare, the upper codes of 4 bits are summed as they are, 16 times too large, which saves shifting them.
  constexpr bool split = BITS == 4 && kSplit && R * M <= 8;
  const uint8_t* codes[R];
  const uint16_t* scales[R];
  const uint16_t* offsets[R];
  const Block* a[M];
  V sum[R][M];
  UNROLL for (int r = 0; r < R; r++) {
    codes[r] = w.codes + (tile + r) * blocks * bytes;
    scales[r] = w.scales + (tile + r) * groups * kTile;
    offsets[r] = OFFSETS ? w.offsets + (tile + r) * groups * kTile : nullptr;
    UNROLL for (int t = 0; t < M; t++) sum[r][t] = add ? load(out[t] + r * kTile) : set(0.0f);
  }
  UNROLL for (int t = 0; t < M; t++) a[t] = x + rows[t] * blocks;
  int64_t at = 0, b = 0;  // in bytes of a tile, and in blocks
  for (int64_t g = 0; g < groups; g++) {
    V scale[R], offset[R];
    UNROLL for (int r = 0; r < R; r++) {
      scale[r] = load_half(scales[r] + g * kTile);
      if (OFFSETS) offset[r] = load_half(offsets[r] + g * kTile);
    }
    for (int64_t end = b + share; b < end; b++, at += bytes) {
      if constexpr (M <= 2 && kEarly > 0) {
        UNROLL for (int r = 0; r < R; r++) {
          UNROLL for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(codes[r] + at + kEarly + i, 0, kNear);
        }
      }
      I c[R][M], high[split ? R : 1][split ? M : 1];
      UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int t = 0; t < M; t++) {
          const int32_t from = a[t][b].correction;
          c[r][t] = set_integer(!OFFSETS ? from : BITS == 8 ? kOffset8 * from : 0);
        }
      }
      if constexpr (BITS == 8) {
        UNROLL for (int q = 0; q < 8; q++) {
          Weights8 v[R];
          UNROLL for (int r = 0; r < R; r++) v[r] = load8(codes[r] + at + q * 64);
          UNROLL for (int t = 0; t < M; t++) {
            UNROLL for (int r = 0; r < R; r++) c[r][t] = dot8(c[r][t], v[r], a[t][b].codes + q * 4);
          }
        }
      } else if constexpr (split) {
        UNROLL for (int r = 0; r < R; r++) {
          UNROLL for (int t = 0; t < M; t++) high[r][t] = set_integer(0);
        }
        UNROLL for (int q = 0; q < 4; q++) {
          Weights4 v[R];
          UNROLL for (int r = 0; r < R; r++) v[r] = load4_unshifted(codes[r] + at + q * 64);
          UNROLL for (int t = 0; t < M; t++) {
            UNROLL for (int r = 0; r < R; r++) {
              c[r][t] = dot8(c[r][t], v[r].low, a[t][b].codes + q * 8);
              high[r][t] = dot8(high[r][t], v[r].high, a[t][b].codes + q * 8 + 4);
            }
          }
        }
        UNROLL for (int t = 0; t < M; t++) {
          UNROLL for (int r = 0; r < R; r++) c[r][t] = add_sixteenth(c[r][t], high[r][t]);
        }
      } else {
        UNROLL for (int q = 0; q < 4; q++) {
          Weights4 v[R];
          UNROLL for (int r = 0; r < R; r++) v[r] = load4(codes[r] + at + q * 64);
          UNROLL for (int t = 0; t < M; t++) {
            UNROLL for (int r = 0; r < R; r++) c[r][t] = dot4(c[r][t], v[r], a[t][b].codes + q * 8);
          }
        }
      }
      UNROLL for (int t = 0; t < M; t++) {
        UNROLL for (int r = 0; r < R; r++) {
          sum[r][t] = fma(to_float(c[r][t]), scale[r] * set(a[t][b].scale), sum[r][t]);
          if (OFFSETS) sum[r][t] = fma(offset[r], set(a[t][b].scale * static_cast<float>(a[t][b].correction)), sum[r][t]);
        }
      }
    }
  }
  UNROLL for (int t = 0; t < M; t++) {
    UNROLL for (int r = 0; r < R; r++) store(out[t] + r * kTile, sum[r][t]);
  }
}

typedef void (*Product)(const Matrix&, int64_t, const Block*, const int32_t*, float* const*, bool);

template <int BITS, bool OFFSETS, int R>
Product product_for(int64_t tokens) {
  switch (tokens) {
    case 1: return product<BITS, OFFSETS, R, 1>;
    case 2: return product<BITS, OFFSETS, R, 2>;
    case 3: return product<BITS, OFFSETS, R, 3>;
    case 4: return product<BITS, OFFSETS, R, 4>;
    case 5: return product<BITS, OFFSETS, R, least(5, kTokens)>;
    default: return product<BITS, OFFSETS, R, least(6, kTokens)>;
  }
}
template <int R>
Product product_for(const Matrix& w, int64_t tokens) {
  if (w.bits == 4) return w.offsets ? product_for<4, true, R>(tokens) : product_for<4, false, R>(tokens);
  return w.offsets ? product_for<8, true, R>(tokens) : product_for<8, false, R>(tokens);
}

// `count` <= kGroup tiles of rows for `tokens` <= kTokens tokens.
inline void rows_of(const Matrix& w, int64_t tile, int64_t count, const Block* x, const int32_t* rows, int64_t tokens, float* const* out,
                    bool add) {
  if (kTiles == kGroup && count == kGroup && tokens > kAlone) return product_for<kTiles>(w, tokens)(w, tile, x, rows, out, add);
  for (int64_t r = 0; r < count; r++) {
    float* column[kTokens];
    for (int64_t t = 0; t < tokens; t++) column[t] = out[t] + r * kTile;
    product_for<1>(w, tokens)(w, tile + r, x, rows, column, add);
  }
}

// The rows of a buffer for the results of kTokens tokens.
struct Rows {
  float* at[kTokens];
  explicit Rows(float (*buffer)[kGroup * kTile]) {
    for (int t = 0; t < kTokens; t++) at[t] = buffer[t];
  }
};

// How many of the `left` tokens to take next: parts of nearly equal size.
inline int64_t take(int64_t left) {
  int64_t parts = (left + kTokens - 1) / kTokens;
  return (left + parts - 1) / parts;
}

// ---- the functions of the table -----------------------------------------------------------------------------------
void quantize(const Matrix& w, const float* input, int64_t count, Block* output) {
  const int32_t middle = w.offsets ? 1 : w.bits == 4 ? -8 : kOffset8 - 128;
  for (int64_t i = 0; i < count; i++) quantize_block(input + i * kBlock, middle, output + i);
}

void linear(const LinearJob& job, int64_t first, int64_t last, int64_t from, int64_t to) {
  const Matrix& w = job.weight;
  alignas(64) float out[kTokens][kGroup * kTile];
  const Rows to_out(out);
  for (int64_t tile = first; tile < last; tile += kGroup) {
    const int64_t count = least(kGroup, last - tile), column = tile * kTile, width = least(count * kTile, w.rows - column);
    for (int64_t t = from, n; t < to; t += n) {
      n = take(to - t);
      int32_t rows[kTokens];
      for (int64_t i = 0; i < n; i++) rows[i] = job.which ? job.which[t + i] : static_cast<int32_t>(t + i);
      rows_of(w, tile, count, job.blocks, rows, n, to_out.at, false);
      for (int64_t i = 0; i < n; i++) {
        float* y = job.output + rows[i] * w.rows + column;
        if (job.bias) {
          for (int64_t j = 0; j < width; j++) y[j] = out[i][j] + job.bias[column + j];
        } else {
          for (int64_t j = 0; j < width; j++) y[j] = out[i][j];
        }
      }
    }
  }
}

float peak(const float* x, int64_t count) {
  V most = set(x[0]);
  int64_t i = 0;
  for (; i + kTile <= count; i += kTile) most = maximum(load(x + i), most);
  float result = largest(most);
  for (; i < count; i++) result = x[i] > result ? x[i] : result;
  return result;
}

// The scales of the blocks from .. from + 15 of 32 columns in a row of lower halves; what lies behind its end is 0.
inline V lower_scales(const LowerHalves& m, const uint8_t* row, int64_t from) {
  const int64_t share = m.block / kBlock, groups = m.columns / m.block;
  alignas(64) uint16_t halves[kTile] = {}, spread[kTile];
  __builtin_memcpy(halves, row + m.columns / 2 + 2 * (from / share), 2 * least(kTile, groups - from / share));
  if (share == 1) return load_half(halves);
  for (int64_t i = 0; i < kTile; i++) spread[i] = halves[i / share];
  return load_half(spread);
}

void refine(const RefineJob& job, int64_t first, int64_t last) {
  constexpr int64_t kAhead = 4, kList = 64;
  const LowerHalves& m = job.lower;
  const int64_t blocks = m.columns / kBlock;
  const auto row_of = [&](int32_t row) { return m.rows + row * m.stride; };
  int32_t rows[kList + kTile];
  for (int64_t at = first; at < last;) {
    int64_t count = 0;
    for (int64_t end; at < last && count <= kList; at = end) {
      end = least(at + kTile, last);
      if (end - at == kTile && !(largest(load(job.output + at)) > job.floor)) continue;
      for (int64_t i = at; i < end; i++) {
        if (job.output[i] > job.floor) rows[count++] = static_cast<int32_t>(i);
      }
    }
    for (int64_t i = 0; i < least(kAhead, count); i++) fetch(row_of(rows[i]), m.stride + 63);
    for (int64_t i = 0; i < count; i++) {
      if (i + kAhead < count) fetch(row_of(rows[i + kAhead]), m.stride + 63);
      const uint8_t* row = row_of(rows[i]);
      V sum = set(0.0f), middle = set(0.0f);
      for (int64_t from = 0; from < blocks; from += kTile) {
        alignas(64) float factors[kTile];
        const V scales = lower_scales(m, row, from);
        store(factors, scales * load(job.scales + from));
        middle = fma(scales, load(job.middles + from), middle);
        const int64_t end = least(from + kTile, blocks);
        for (int64_t b = from; b < end; b++) {
          sum = fma(dot_halves(row + b * (kBlock / 2), job.blocks[b].codes), set(factors[b - from]), sum);
        }
      }
      float& y = job.output[rows[i]];
      const float above = y - job.floor;
      y += (above < 1.0f ? above : 1.0f) * total(sum - middle);
    }
  }
}

// The matrix of expert e.
inline Matrix of_expert(const Matrix& first, int64_t tiles, int64_t e) {
  Matrix m = first;
  m.codes += e * tiles * m.columns * kTile * m.bits / 8;
  m.scales += e * tiles * (m.columns / m.block) * kTile;
  if (m.offsets) m.offsets += e * tiles * (m.columns / m.block) * kTile;
  return m;
}

inline void add_bias(float* x, const float* bias) {
  for (int j = 0; j < kBlock; j++) x[j] += bias[j];
}

// The part of `bytes` that is fetched beside `n` of `all` tokens, `done` of which are done.
struct Share {
  int64_t from, bytes;
};
inline Share share(int64_t bytes, int64_t done, int64_t n, int64_t all) {
  const int64_t from = bytes * done / all / 64 * 64, to = done + n == all ? bytes : bytes * (done + n) / all / 64 * 64;
  return {from, to - from};
}

void expand(const QuantizedFfnJob& job, int64_t first, int64_t last) {
  const int64_t second = job.neurons / kTile, tile_bytes = job.up.columns * kTile * job.up.bits / 8;
  alignas(64) float h[kTokens][kBlock], u[kTokens][kBlock];
  const Rows to_h(h), to_u(u);
  for (int64_t unit = first; unit < last; unit++) {
    const int64_t expert = job.used[unit / job.chunks], chunk = unit % job.chunks, tile = chunk * kGroup;
    const int64_t next = unit + 1 < last ? unit + 1 : unit;
    const int64_t next_tile = job.used[next / job.chunks] * job.up_tiles + next % job.chunks * kGroup;
    const Matrix up = of_expert(job.up, job.up_tiles, expert);
    const float* bias = job.bias ? job.bias + expert * up.rows + chunk * kBlock : nullptr;
    const int64_t begin = job.starts[expert], end = job.starts[expert + 1];
    for (int64_t at = begin, n; at < end; at += n) {
      n = take(end - at);
      if (next != unit) {
        const Share part = share(kGroup * tile_bytes, at - begin, n, end - begin);
        const uint8_t* from = job.up.codes + next_tile * tile_bytes + part.from;
        fetch(from, part.bytes);
        if (job.gated) fetch(from + second * tile_bytes, part.bytes);
      }
      const int32_t* rows = job.tokens_of + at;
      rows_of(up, tile, kGroup, job.blocks, rows, n, to_h.at, false);
      if (job.gated) rows_of(up, second + tile, kGroup, job.blocks, rows, n, to_u.at, false);
      for (int64_t i = 0; i < n && bias; i++) {
        add_bias(h[i], bias);
        if (job.gated) add_bias(u[i], bias + job.neurons);
      }
      activate(job.activation, h[0], static_cast<int>(n) * kBlock);
      for (int64_t i = 0; i < n; i++) {
        const V gate = set(job.gates[at + i]);
        for (int j = 0; j < kBlock; j += kTile) {
          V v = load(h[i] + j) * gate;
          store(h[i] + j, job.gated ? v * load(u[i] + j) : v);
        }
        quantize(job.down, h[i], 1, job.hidden + (at + i) * job.chunks + chunk);
      }
    }
  }
}

inline void start_output(const FfnJob& job, int64_t column, int64_t width) {
  if (job.add) return;
  for (int64_t t = 0; t < job.tokens; t++) {
    const int64_t at = t * job.rows + column;
    for (int64_t j = 0; j < width; j++) job.output[at + j] = job.down_bias ? job.down_bias[column + j] : 0.0f;
    for (int64_t j = 0; j < width && job.base; j++) job.output[at + j] += job.base[at + j];
  }
}

inline void add_to(float* y, const float* x, int64_t width) {
  int64_t j = 0;
  for (; j + kTile <= width; j += kTile) store(y + j, load(y + j) + load(x + j));
  for (; j < width; j++) y[j] += x[j];
}

void contract(const QuantizedFfnJob& job, int64_t first, int64_t last) {
  const int64_t rows = job.rows, tile_bytes = job.down.columns * kTile * job.down.bits / 8;
  alignas(64) float out[kTokens][kGroup * kTile];
  const Rows to_out(out);
  for (int64_t tile = first; tile < last; tile += kGroup) {
    const int64_t count = least(kGroup, last - tile), column = tile * kTile, width = least(count * kTile, rows - column);
    const bool whole = width == count * kTile;  // otherwise the output has no room for what is computed
    start_output(job, column, width);
    for (int64_t used = 0; used < job.used_count; used++) {
      const int64_t e = job.used[used];
      const bool same = used + 1 < job.used_count;  // the next expert's rows, or the next rows of the first
      const int64_t next = job.used[same ? used + 1 : 0] * job.down_tiles + tile + (same ? 0 : count);
      fetch(job.down.codes + next * tile_bytes, count * tile_bytes);
      const Matrix down = of_expert(job.down, job.down_tiles, e);
      for (int64_t at = job.starts[e], end = job.starts[e + 1], n; at < end; at += n) {
        n = take(end - at);
        int32_t rows_at[kTokens];
        float* y[kTokens];
        for (int64_t i = 0; i < n; i++) {
          rows_at[i] = static_cast<int32_t>(at + i);
          y[i] = job.output + job.tokens_of[at + i] * rows + column;
        }
        rows_of(down, tile, count, job.hidden, rows_at, n, whole ? y : to_out.at, whole);
        for (int64_t i = 0; i < n && !whole; i++) add_to(y[i], out[i], width);
      }
    }
  }
}

// Scores of M tokens for R experts. Each is summed in the same order whatever R and M are: a choice does not depend on what is beside it.
template <int R, int M>
void scores_of(const float* x, const float* router, const float* bias, int64_t experts, int64_t columns, float* scores) {
  V sum[R][M];
  UNROLL for (int r = 0; r < R; r++) {
    UNROLL for (int t = 0; t < M; t++) sum[r][t] = set(0.0f);
  }
  const int64_t whole = columns / kTile * kTile;
  for (int64_t j = 0; j < whole; j += kTile) {
    V row[R];
    UNROLL for (int r = 0; r < R; r++) row[r] = load(router + r * columns + j);
    UNROLL for (int t = 0; t < M; t++) {
      const V v = load(x + t * columns + j);
      UNROLL for (int r = 0; r < R; r++) sum[r][t] = fma(v, row[r], sum[r][t]);
    }
  }
  for (int r = 0; r < R; r++) {
    for (int t = 0; t < M; t++) {
      float score = total(sum[r][t]);
      for (int64_t j = whole; j < columns; j++) score += x[t * columns + j] * router[r * columns + j];
      scores[t * experts + r] = score + bias[r];
    }
  }
}

void route(const float* x, const float* router, const float* bias, int64_t experts, int64_t columns, int64_t tokens, float* scores) {
  constexpr int R = kColumns, M = kRows, kAlone = 4;  // a token alone needs several sums in flight
  constexpr int64_t kNear = 2 * M;                    // tokens that stay in the first-level cache while the router passes by
  for (int64_t from = 0; from < tokens; from += kNear) {
    const int64_t to = least(from + kNear, tokens);
    for (int64_t e = 0, r; e < experts; e += r) {
      r = experts - e >= kAlone ? kAlone : 1;
      for (int64_t t = from, m; t < to; t += m) {
        m = to - t >= M ? M : 1;
        const float* at = x + t * columns;
        float* out = scores + t * experts;
        for (int64_t i = 0, n; i < r; i += n) {
          n = m == 1 ? r : r - i >= R ? R : 1;
          const auto f = m == 1 ? (n == 1 ? scores_of<1, 1> : scores_of<kAlone, 1>) : n == 1 ? scores_of<1, M> : scores_of<R, M>;
          f(at, router + (e + i) * columns, bias + e + i, experts, columns, out + e + i);
        }
      }
    }
  }
}

void decode(const Matrix& w, int64_t row, float* output) {
  const int64_t blocks = w.columns / kBlock, groups = w.columns / w.block, tile = row / kTile, lane = row % kTile;
  const int64_t bytes = w.bits * kTile * kBlock / 8;
  alignas(64) float scale[kTile], offset[kTile];
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t g = (tile * groups + b * kBlock / w.block) * kTile;
    store(scale, load_half(w.scales + g));
    if (w.offsets) store(offset, load_half(w.offsets + g));
    const float from = w.offsets ? offset[lane] : scale[lane] * (w.bits == 4 ? -8.0f : -128.0f);
    const uint8_t* codes = w.codes + (tile * blocks + b) * bytes + lane * 4;
    for (int j = 0; j < kBlock; j++) {
      const int32_t code = w.bits == 8 ? codes[j / 4 * 64 + j % 4] : codes[j / 8 * 64 + j % 4] >> (j / 4 % 2 * 4) & 15;
      output[b * kBlock + j] = scale[lane] * static_cast<float>(code) + from;
    }
  }
}

void decode_lower(const LowerHalves& m, int64_t row, float* output) {
  const uint8_t* codes = m.rows + row * m.stride;
  for (int64_t from = 0; from < m.columns / kBlock; from += kTile) {
    alignas(64) float scales[kTile];
    store(scales, lower_scales(m, codes, from));
    for (int64_t i = from * kBlock; i < least((from + kTile) * kBlock, m.columns); i++) {
      const int32_t code = codes[i / kBlock * (kBlock / 2) + i % 16] >> (i % kBlock < 16 ? 0 : 4) & 15;
      output[i] += scales[i / kBlock - from] * (static_cast<float>(code) - 7.5f);
    }
  }
}
