// The kernels of experts in floats. Included after multiply.h by the file of each instruction set.

constexpr int64_t kTogether = 8 * kRows;  // uses that share a pass over a panel of weights, and
constexpr int64_t kDepth = 128;           // its columns that stay in the first-level cache meanwhile
constexpr int64_t kWidth = kWide * kTile;

// out [n, kWidth] = the rows x[0 .. n - 1], n <= kTogether, times `count` tiles.
inline void panel(const float* const* x, int64_t n, const float* const* tiles, int64_t count, int64_t depth, float* out) {
  const int64_t piece = n <= kRows ? depth : kDepth;
  for (int64_t k = 0; k < depth; k += piece) {
    const float* b[kWide];
    for (int64_t i = 0; i < count; i++) b[i] = tiles[i] + k * kTile;
    for (int64_t t = 0, m; t < n; t += m) {
      const int64_t parts = (n - t + kRows - 1) / kRows;
      m = (n - t + parts - 1) / parts;
      const float* a[kRows];
      for (int64_t i = 0; i < m; i++) a[i] = x[t + i] + k;
      multiply_tiles(m, count, a, b, kTile, out + t * kWidth, kWidth, least(piece, depth - k), k > 0);
    }
  }
}

void expand_floats(const FloatFfnJob& job, int64_t expert, int64_t chunk) {
  const int64_t part = job.gated ? kWide / 2 : kWide, all = job.up_tiles / (job.gated ? 2 : 1);  // tiles: of a chunk, of the gate
  const int64_t first = chunk * part, count = least(part, all - first), wide = count * kTile, at_neuron = first * kTile;
  const int64_t biased = least(wide, job.neurons - at_neuron), stride = job.chunks * part * kTile;
  const float* tiles[kWide];
  for (int64_t i = 0; i < count; i++) {
    tiles[i] = job.up + (expert * job.up_tiles + first + i) * job.columns * kTile;
    if (job.gated) tiles[count + i] = tiles[i] + all * job.columns * kTile;
  }
  const float* bias = job.bias ? job.bias + expert * job.neurons * (job.gated ? 2 : 1) + at_neuron : nullptr;
  alignas(64) float out[kTogether * kWidth];
  const float* x[kTogether];
  for (int64_t at = job.starts[expert], end = job.starts[expert + 1], n; at < end; at += n) {
    n = least(kTogether, end - at);
    for (int64_t i = 0; i < n; i++) x[i] = job.input + job.tokens_of[at + i] * job.columns;
    panel(x, n, tiles, job.gated ? 2 * count : count, job.columns, out);
    for (int64_t i = 0; i < n; i++) {
      float *h = out + i * kWidth, *u = h + wide, *to = job.hidden + (at + i) * stride + at_neuron;
      for (int64_t j = 0; j < biased && bias; j++) h[j] += bias[j];
      for (int64_t j = 0; j < biased && bias && job.gated; j++) u[j] += bias[job.neurons + j];
      activate(job.activation, h, static_cast<int>(wide));
      const V gate = set(job.gates[at + i]);
      for (int64_t j = 0; j < wide; j += kTile) {
        const V v = load(h + j) * gate;
        store(to + j, job.gated ? v * load(u + j) : v);
      }
    }
  }
}

void contract_floats(const FloatFfnJob& job, int64_t first, int64_t last) {
  const int64_t rows = job.rows, stride = job.chunks * (job.gated ? kWide / 2 : kWide) * kTile;
  alignas(64) float out[kTogether * kWidth];
  const float *x[kTogether], *tiles[kWide];
  for (int64_t tile = first; tile < last; tile += kWide) {
    const int64_t count = least(kWide, last - tile), column = tile * kTile, width = least(count * kTile, rows - column);
    for (int64_t t = 0; t < job.tokens; t++) {
      for (int64_t j = 0; j < width; j++) job.output[t * rows + column + j] = job.down_bias ? job.down_bias[column + j] : 0.0f;
    }
    for (int64_t e = 0; e < job.experts; e++) {
      for (int64_t i = 0; i < count; i++) tiles[i] = job.down + (e * job.down_tiles + tile + i) * job.neurons * kTile;
      for (int64_t at = job.starts[e], end = job.starts[e + 1], n; at < end; at += n) {
        n = least(kTogether, end - at);
        for (int64_t i = 0; i < n; i++) x[i] = job.hidden + (at + i) * stride;
        panel(x, n, tiles, count, job.neurons, out);
        for (int64_t i = 0; i < n; i++) {
          float* y = job.output + job.tokens_of[at + i] * rows + column;
          const float* more = out + i * kWidth;
          int64_t j = 0;
          for (; j + kTile <= width; j += kTile) store(y + j, load(y + j) + load(more + j));
          for (; j < width; j++) y[j] += more[j];
        }
      }
    }
  }
}
