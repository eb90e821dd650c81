// The kernels of experts in floats. Included after multiply.h by the file of each instruction set.

constexpr int64_t kTogether = 8 * kRows;  // uses that share a pass over a panel of weights, and
constexpr int64_t kDepth = 128;           // its columns that stay in the first-level cache meanwhile
constexpr int64_t kWidth = kWide * kTile;
constexpr int64_t kAhead = 8192;          // bytes of the next expert that are fetched; the processor guesses the rest

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

void expand_floats(const FloatFfnJob& job, int64_t first, int64_t last) {
  const int64_t part = job.gated ? kWide / 2 : kWide, all = job.up_tiles / (job.gated ? 2 : 1);  // tiles: of a chunk, of the gate
  const int64_t stride = job.chunks * part * kTile, tile_floats = job.columns * kTile;
  alignas(64) float out[kTogether * kWidth];
  const float *x[kTogether], *tiles[kWide];
  for (int64_t unit = first; unit < last; unit++) {
    const int64_t expert = job.used[unit / job.chunks], tile = unit % job.chunks * part, count = least(part, all - tile);
    const int64_t wide = count * kTile, neuron = tile * kTile, biased = least(wide, job.neurons - neuron);
    const int64_t next = unit + 1 < last ? unit + 1 : unit;
    const int64_t next_tile = job.used[next / job.chunks] * job.up_tiles + next % job.chunks * part;
    for (int64_t i = 0; i < count; i++) {
      tiles[i] = job.up + (expert * job.up_tiles + tile + i) * tile_floats;
      if (job.gated) tiles[count + i] = tiles[i] + all * tile_floats;
    }
    const float* bias = job.bias ? job.bias + expert * job.neurons * (job.gated ? 2 : 1) + neuron : nullptr;
    const int64_t begin = job.starts[expert], end = job.starts[expert + 1];
    for (int64_t at = begin, n; at < end; at += n) {
      n = least(kTogether, end - at);
      if (next != unit && end - begin > 1) {
        const Share ahead = share(part * tile_floats * 4, at - begin, n, end - begin);
        const char* from = reinterpret_cast<const char*>(job.up + next_tile * tile_floats) + ahead.from;
        fetch(from, ahead.bytes);
        if (job.gated) fetch(from + all * tile_floats * 4, ahead.bytes);
      }
      for (int64_t i = 0; i < n; i++) x[i] = job.input + job.tokens_of[at + i] * job.columns;
      panel(x, n, tiles, job.gated ? 2 * count : count, job.columns, out);
      for (int64_t i = 0; i < n; i++) {
        float *h = out + i * kWidth, *u = h + wide, *to = job.hidden + (at + i) * stride + neuron;
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
}

void contract_floats(const FloatFfnJob& job, int64_t first, int64_t last) {
  const int64_t rows = job.rows, stride = job.chunks * (job.gated ? kWide / 2 : kWide) * kTile, tile_floats = job.neurons * kTile;
  alignas(64) float out[kTogether * kWidth];
  const float *x[kTogether], *tiles[kWide];
  for (int64_t tile = first; tile < last; tile += kWide) {
    const int64_t count = least(kWide, last - tile), column = tile * kTile, width = least(count * kTile, rows - column);
    start_output(job, column, width);
    for (int64_t used = 0; used < job.used_count; used++) {
      const int64_t e = job.used[used];
      const bool same = used + 1 < job.used_count;  // the next expert's rows, or the next rows of the first
      const int64_t following = job.used[same ? used + 1 : 0] * job.down_tiles + tile + (same ? 0 : count);
      fetch(job.down + following * tile_floats, least(kAhead, count * tile_floats * 4));
      for (int64_t i = 0; i < count; i++) tiles[i] = job.down + (e * job.down_tiles + tile + i) * tile_floats;
      for (int64_t at = job.starts[e], end = job.starts[e + 1], n; at < end; at += n) {
        n = least(kTogether, end - at);
        for (int64_t i = 0; i < n; i++) x[i] = job.hidden + (at + i) * stride;
        panel(x, n, tiles, count, job.neurons, out);
        for (int64_t i = 0; i < n; i++) add_to(job.output + job.tokens_of[at + i] * rows + column, out + i * kWidth, width);
      }
    }
  }
}
