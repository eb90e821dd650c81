// The kernels of attention. Included after kernel_body.h and multiply.h by the file of each instruction set, which has also defined
//   transpose         16 floats of each of 16 rows -> 16 columns
//   largest           of the 16 floats of a V
//   load_bytes        16 int8 as a V
//   store_bytes       a V, rounded to the nearest integers (to even), as 16 int8

// ---- rotary embedding ---------------------------------------------------------------------------------------------
// One head x [head_dim] at a position, times `factor`.
inline void rotate(const AttentionJob& job, const float* __restrict x, int64_t position, float factor, float* __restrict y) {
  const int64_t half = job.half;
  const float* __restrict c = job.cos + position * half;
  const float* __restrict s = job.sin + position * half;
  if (job.interleaved) {
    for (int64_t i = 0; i < half; i++) {
      const float a = x[2 * i], b = x[2 * i + 1];
      y[2 * i] = (a * c[i] - b * s[i]) * factor;
      y[2 * i + 1] = (b * c[i] + a * s[i]) * factor;
    }
  } else {
    for (int64_t i = 0; i < half; i++) {
      const float a = x[i], b = x[half + i];
      y[i] = (a * c[i] - b * s[i]) * factor;
      y[half + i] = (b * c[i] + a * s[i]) * factor;
    }
  }
  for (int64_t i = 2 * half; i < job.head_dim; i++) y[i] = x[i] * factor;
}

// ---- entries in int8 ----------------------------------------------------------------------------------------------
// x [d] as codes and their scale, the largest magnitude / 127. With an infinity or a NaN all of it is NaN.
inline void encode_entry(const float* x, int64_t d, char* entry) {
  int32_t peak = 0;
  for (int64_t i = 0; i < d; i++) {
    int32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    peak = bits > peak ? bits : peak;
  }
  const Range range = range_of(peak);
  for (int64_t i = 0; i < d; i += kTile) store_bytes(entry + i, range.factor == 0.0f ? set(0.0f) : load(x + i) * set(range.factor));
  __builtin_memcpy(entry + d, &range.scale, sizeof range.scale);
}

inline const float* decode_entry(const char* entry, int64_t d, float* x) {
  float scale;
  __builtin_memcpy(&scale, entry + d, sizeof scale);
  for (int64_t i = 0; i < d; i += kTile) store(x + i, load_bytes(entry + i) * set(scale));
  return x;
}

void append(const AttentionJob& job, int64_t first, int64_t last) {
  alignas(64) float turned[kMaxHeadDim];
  const int64_t d = job.head_dim;
  for (int64_t t = first; t < last; t++) {
    const int64_t row = t / job.length, position = job.past[row] + t % job.length, entry = job.entries(row, position);
    if (!job.is_present(row, position)) continue;
    for (int64_t h = 0; h < job.kv_heads; h++) {
      const int64_t at = ((row * job.kv_heads + h) * job.capacity + entry) * job.entry;
      const float *k = job.key + t * job.key_stride + h * d, *v = job.value + t * job.key_stride + h * d;
      if (job.coded) {
        rotate(job, k, position, 1.0f, turned);
        encode_entry(turned, d, job.key_cache + at);
        encode_entry(v, d, job.value_cache + at);
        continue;
      }
      rotate(job, k, position, 1.0f, reinterpret_cast<float*>(job.key_cache + at));
      float* values = reinterpret_cast<float*>(job.value_cache + at);
      for (int64_t i = 0; i < d; i += kTile) store(values + i, load(v + i));
    }
  }
}

// ---- attention ----------------------------------------------------------------------------------------------------
constexpr float kLowest = -3e38f;

// What a query has seen: the largest score, and relative to it the sum of the weights (16 partial sums) and of the weighted values.
struct Seen {
  float *peak, *sum, *out;
};

// One query's scores of `columns` keys, plus `bias` unless that is null -> weights relative to its largest score so far; only the keys
// low .. high - 1 count.
inline void weigh(const AttentionJob& job, float* scores, const float* bias, int64_t columns, int64_t low, int64_t high, Seen seen) {
  alignas(64) static const float kLanes[kTile] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const bool all = low <= 0 && high >= columns;
  const V from = set(static_cast<float>(low)), to = set(static_cast<float>(high)), lowest = set(kLowest), zero = set(0.0f);
  V peak = lowest;
  for (int64_t i = 0; i < columns; i += kTile) {
    V s = load(scores + i);
    if (job.softcap != 0.0f) s = tanh(s) * set(job.softcap);
    if (bias) s = s + load(bias + i);
    if (!all) {
      const V lane = load(kLanes) + set(static_cast<float>(i));
      s = if_less(lane, to, if_less(lane, from, lowest, s), lowest);
    }
    peak = maximum(peak, s);
    store(scores + i, s);
  }
  const float most = largest(peak);
  if (most > *seen.peak) {
    const V fade = exp(set(*seen.peak) - set(most));
    store(seen.sum, load(seen.sum) * fade);
    for (int64_t i = 0; i < job.head_dim; i += kTile) store(seen.out + i, load(seen.out + i) * fade);
    *seen.peak = most;
  }
  V sum = load(seen.sum);
  for (int64_t i = 0; i < columns; i += kTile) {
    V w = exp(load(scores + i) - set(*seen.peak));
    if (!all) {
      const V lane = load(kLanes) + set(static_cast<float>(i));
      w = if_less(lane, to, if_less(lane, from, zero, w), zero);
    }
    sum = sum + w;
    store(scores + i, w);
  }
  store(seen.sum, sum);
}

void attend(const AttentionJob& job, const AttentionUnit& unit) {
  alignas(64) float query[kUnitFloats], out[kUnitFloats], keys[kMaxHeadDim * kKeys], weights[kRows * kKeys];
  alignas(64) float sum[kUnitRows * kTile], biases[kKeys], decoded[kTile * kMaxHeadDim], decoded_values[kMaxHeadDim * kKeys];
  float peak[kUnitRows];
  const int64_t d = job.head_dim, group = job.heads / job.kv_heads, past = job.past[unit.row];
  const int64_t cache = (unit.row * job.kv_heads + unit.head) * job.capacity * job.entry, element = job.coded ? 1 : sizeof(float);
  const char* key_cache = job.key_cache + cache;
  const char* value_cache = job.value_cache + cache;
  const float factor = job.softcap != 0.0f ? job.scale / job.softcap : job.scale;
  const int32_t* position = job.position ? job.position + unit.row * job.capacity : nullptr;
  const float* gates = job.gates ? job.gates + unit.row * job.length : nullptr;
  int64_t open[kUnitRows], begin[kUnitRows], end[kUnitRows], rows = 0;  // the queries that are computed, side by side, and what they see
  for (int64_t at = unit.from; at < unit.to; at++) {
    const int64_t s = at / group, head = unit.head * group + at % group, r = rows;
    if ((gates && gates[s] == 0.0f) || !job.is_present(unit.row, past + s)) continue;
    rotate(job, job.query + (unit.row * job.length + s) * job.query_stride + head * d, past + s, factor, query + r * d);
    for (int64_t i = 0; i < d; i += kTile) store(out + r * d + i, set(0.0f));
    store(sum + r * kTile, set(0.0f));
    peak[r] = kLowest;
    begin[r] = job.first_seen(unit.row, past + s), end[r] = job.entries(unit.row, past + s + 1);
    open[rows++] = at;
  }
  for (int64_t k = unit.begin; k < unit.end && rows > 0; k += kKeys) {
    const int64_t count = least(kKeys, unit.end - k);
    for (int64_t j = 0; j < count; j += kTile) {
      const float* from[kTile];
      for (int64_t i = 0; i < kTile; i++) {
        const char* entry = key_cache + (k + least(j + i, count - 1)) * job.entry;
        from[i] = job.coded ? decode_entry(entry, d, decoded + i * d) : reinterpret_cast<const float*>(entry);
      }
      for (int64_t i = 0; i < d; i += kTile) {
        transpose(from, i, keys + i * kKeys + j, kKeys);
        // As much of these keys' values and of the next keys, on their way meanwhile.
        const int64_t same = (k + j) * job.entry + i * kTile * element;
        for (int64_t line = 0; line < kTile * kTile * element; line += 64) {
          __builtin_prefetch(value_cache + same + line);
          __builtin_prefetch(key_cache + same + kKeys * job.entry + line);
        }
      }
    }
    const float* values = reinterpret_cast<const float*>(value_cache + k * job.entry);
    if (job.coded) {
      for (int64_t i = 0; i < count; i++) decode_entry(value_cache + (k + i) * job.entry, d, decoded_values + i * d);
      values = decoded_values;
    }
    for (int64_t r = 0, n; r < rows; r += n) {
      n = least(kRows, rows - r);
      const int64_t low = begin[r] > k ? begin[r] - k : 0, high = least(count, end[r + n - 1] - k);
      if (low >= high) continue;
      const int64_t columns = (high + kTile - 1) / kTile * kTile;
      const float *queries[kRows], *shares[kRows];
      for (int64_t i = 0; i < n; i++) queries[i] = query + (r + i) * d, shares[i] = weights + i * kKeys + low;
      multiply_all(n, columns, queries, keys, kKeys, weights, kKeys, d, false);
      for (int64_t i = 0; i < n; i++) {
        const int64_t at = past + open[r + i] / group, head = unit.head * group + open[r + i] % group;
        const float* bias = job.bias ? job.bias + head * (job.reach + kKeys) + job.reach - 1 - at : nullptr;
        if (bias && position) {
          for (int64_t j = 0; j < high; j++) biases[j] = bias[least(at, position[k + j])];
          bias = biases;
        } else if (bias) {
          bias += k;
        }
        const Seen seen = {peak + r + i, sum + (r + i) * kTile, out + (r + i) * d};
        weigh(job, weights + i * kKeys, bias, columns, begin[r + i] - k, least(count, end[r + i] - k), seen);
      }
      multiply_all(n, d, shares, values + low * d, d, out + r * d, d, high - low, true);
    }
  }
  for (int64_t at = unit.from, r = 0; at < unit.to; at++) {
    const bool computed = r < rows && open[r] == at;
    float total = 0.0f;
    for (int i = 0; i < kTile && computed; i++) total += sum[r * kTile + i];
    float* y;
    V by = set(1.0f);
    if (unit.partial) {
      y = unit.partial + (at - unit.from) * (d + kTile);
      y[d] = computed ? peak[r] : kLowest, y[d + 1] = total;
    } else {
      const int64_t s = at / group, head = unit.head * group + at % group;
      y = job.output + ((unit.row * job.length + s) * job.heads + head) * d;
      by = set(total == 0.0f ? 0.0f : 1.0f / total);
    }
    for (int64_t i = 0; i < d; i += kTile) store(y + i, computed ? load(out + r * d + i) * by : set(0.0f));
    r += computed;
  }
}
