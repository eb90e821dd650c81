// CachedAttention: causal attention of new tokens over a KV cache, with the rotary embedding inside. QuantizedCachedAttention: the same over
// keys and values in int8. A cache has entries of the tokens that are present alone: the pages behind them are not touched.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "operators.h"

namespace dyncomp {
namespace {

template <Type CACHE>
constexpr Input kInputs[] = {
    {Type::kFloat, false}, {Type::kFloat, true}, {Type::kFloat, true},  // query, key, value
    {CACHE, false},        {CACHE, false},       {Type::kInt64, false},  // key_cache, value_cache, past_length
    {Type::kFloat, true},  {Type::kFloat, true}, {Type::kFloat, true},  // cos, sin, present
    {Type::kFloat, true},  {Type::kFloat, true},                        // bias, gates
};
// With fewer than kFewUnits units of work, the keys are divided among units of kSplitKeys.
constexpr int64_t kFewUnits = 16, kSplitKeys = 64;
constexpr int64_t kTurning = 12;  // reading and transposing a key costs as much as multiplying it with so many queries

struct Attention {
  int64_t heads, kv_heads, interleaved, window;
  float scale, softcap;
};

void* create(Attributes& attributes) {
  const Attention op = {attributes.integer("heads"),  attributes.integer("kv_heads"), attributes.integer("interleaved"),
                        attributes.integer("window"), attributes.number("scale"),     attributes.number("softcap")};
  if (op.kv_heads < 1 || op.kv_heads > INT32_MAX || op.heads < 1 || op.heads > INT32_MAX || op.heads % op.kv_heads) {
    attributes.fail("heads is no multiple of kv_heads");
  }
  if (op.window < 0 || op.window > INT32_MAX) attributes.fail("the window is negative or too large");
  return keep(attributes, op);
}

void destroy(void* kernel) { delete static_cast<Attention*>(kernel); }

// A unit of work is `rows` queries of a group (S * G of them, `tiles` units) over `keys` entries of the cache.
struct Work {
  AttentionJob job;
  int64_t rows, tiles, keys, splits;
  float* partial;  // [units, rows, head_dim + 16], when there are several splits
};

// Unit i. Later queries see more keys: they come first.
AttentionUnit unit_of(const Work& work, int64_t i) {
  const AttentionJob& job = work.job;
  const int64_t group = job.heads / job.kv_heads, split = i % work.splits, which = i / work.splits % (job.batch * job.kv_heads);
  const int64_t tile = work.tiles - 1 - i / work.splits / (job.batch * job.kv_heads);
  AttentionUnit unit = {};
  unit.row = which / job.kv_heads, unit.head = which % job.kv_heads;
  unit.from = tile * work.rows, unit.to = std::min(unit.from + work.rows, job.length * group);
  const int64_t past = job.past[unit.row], end = job.entries(unit.row, past + (unit.to - 1) / group + 1);
  const int64_t begin = job.first_seen(unit.row, past + unit.from / group);
  unit.begin = std::min(end, begin + split * work.keys), unit.end = std::min(end, unit.begin + work.keys);
  if (work.partial) unit.partial = work.partial + i * work.rows * (job.head_dim + kTile);
  return unit;
}

void run_append(const void* user, int64_t first, int64_t last) { active->append(static_cast<const Work*>(user)->job, first, last); }

void run_attend(const void* user, int64_t first, int64_t last) {
  const Work& work = *static_cast<const Work*>(user);
  for (int64_t i = first; i < last; i++) active->attend(work.job, unit_of(work, i));
}

// Adds up what the splits of the same queries have seen.
void merge(const Work& work, int64_t units) {
  const AttentionJob& job = work.job;
  const int64_t d = job.head_dim, stride = d + kTile, group = job.heads / job.kv_heads;
  for (int64_t i = 0; i < units; i += work.splits) {
    const AttentionUnit unit = unit_of(work, i);
    for (int64_t r = unit.from; r < unit.to; r++) {
      const float* part = unit.partial + (r - unit.from) * stride;
      float* y = job.output + ((unit.row * job.length + r / group) * job.heads + unit.head * group + r % group) * d;
      float peak = part[d], total = 0.0f;
      for (int64_t s = 1; s < work.splits; s++) peak = std::max(peak, part[s * work.rows * stride + d]);
      std::fill(y, y + d, 0.0f);
      for (int64_t s = 0; s < work.splits; s++, part += work.rows * stride) {
        const float share = std::exp(part[d] - peak);
        total += share * part[d + 1];
        for (int64_t j = 0; j < d; j++) y[j] += share * part[j];
      }
      for (int64_t j = 0; total != 0.0f && j < d; j++) y[j] /= total;  // an absent token has seen nothing
    }
  }
}

// Which entries the tokens have that are present, and the positions of these.
void list_present(const AttentionJob& job, const float* marks, int32_t* before, int32_t* position) {
  for (int64_t row = 0; row < job.batch; row++) {
    const float* mark = marks + row * job.capacity;
    int32_t *count = before + row * (job.capacity + 1), *of = position + row * job.capacity, n = 0;
    const int64_t tokens = job.past[row] + job.length;
    for (int64_t at = 0; at < tokens; at++) {
      count[at] = n, of[n] = static_cast<int32_t>(at);
      n += mark[at] != 0.0f;
    }
    count[tokens] = n;
  }
}

bool equal(const Shape& a, const Shape& b) { return a.rank == b.rank && std::equal(a.sizes, a.sizes + a.rank, b.sizes); }

void compute(const void* kernel, Call& call, bool coded) {
  const Attention& op = *static_cast<const Attention*>(kernel);
  const auto show = [](int64_t x) { return static_cast<long long>(x); };
  Shape query, key, value, caches, values, table, sines, present, bias, gates;
  Work work = {};
  AttentionJob& job = work.job;
  job.query = call.input<float>(0, "query", false, &query);
  job.key = call.input<float>(1, "key", true, &key);
  job.value = call.input<float>(2, "value", true, &value);
  const void* key_cache = call.input<void>(3, "key_cache", false, &caches);
  const void* value_cache = call.input<void>(4, "value_cache", false, &values);
  job.cos = call.input<float>(6, "cos", true, &table);
  job.sin = call.input<float>(7, "sin", true, &sines);
  const float* marks = call.input<float>(8, "present", true, &present);
  job.bias = call.input<float>(9, "bias", true, &bias);
  job.gates = call.input<float>(10, "gates", true, &gates);
  if (call.failed()) return;
  if (query.rank != 3 || caches.rank != 4 || !equal(caches, values)) {
    call.fail("the query should have 3 dimensions, and the caches the same 4");
    return;
  }
  job.batch = query.sizes[0], job.length = query.sizes[1], job.heads = op.heads, job.kv_heads = op.kv_heads;
  constexpr int64_t wide = sizeof(float);
  job.capacity = caches.sizes[2], job.coded = coded, job.entry = caches.sizes[3] * (coded ? 1 : wide);
  job.head_dim = coded ? std::max<int64_t>(0, caches.sizes[3] - wide) : caches.sizes[3];
  job.window = op.window, job.interleaved = static_cast<int32_t>(op.interleaved), job.scale = op.scale, job.softcap = op.softcap;
  job.past = call.input<int64_t>(5, "past_length", false, job.batch);
  const int64_t d = job.head_dim, width = op.heads * d, kv_width = op.kv_heads * d;
  const bool packed = job.key == nullptr && job.value == nullptr;
  if (d < kTile || d > kMaxHeadDim || d % kTile) {
    call.fail("heads of %lld features; a multiple of %d up to %d is needed", show(d), kTile, kMaxHeadDim);
  } else if (caches.sizes[0] != job.batch || caches.sizes[1] != op.kv_heads) {
    call.fail("caches of %lld rows and %lld heads; there should be %lld and %lld", show(caches.sizes[0]), show(caches.sizes[1]),
              show(job.batch), show(op.kv_heads));
  } else if (query.last() != width + (packed ? 2 * kv_width : 0)) {
    call.fail("the last dimension of query is %lld; it should be %lld", show(query.last()), show(width + (packed ? 2 * kv_width : 0)));
  } else if (!packed && (!job.key || !job.value || key.rank != 3 || key.sizes[0] != job.batch || key.sizes[1] != job.length ||
                         key.last() != kv_width || !equal(key, value))) {
    call.fail("key and value should both be there, or neither, and have the shape [%lld, %lld, %lld]", show(job.batch), show(job.length),
              show(kv_width));
  } else if (marks && present.count() != static_cast<size_t>(job.batch * job.capacity)) {
    call.fail("present should have a number for each of %lld rows and %lld entries", show(job.batch), show(job.capacity));
  } else if (job.gates && gates.count() != job.batch * job.length) {
    call.fail("gates should have a number for each of %lld tokens", show(job.batch * job.length));
  } else if (job.bias && (bias.rank != 2 || bias.sizes[0] != op.heads || bias.last() <= kKeys)) {
    call.fail("bias should have for each of %lld heads a number for each distance, and %d more", show(op.heads), kKeys);
  } else if ((job.cos == nullptr) != (job.sin == nullptr) ||
             (job.cos && (table.rank != 2 || !equal(table, sines) || 2 * table.last() > d))) {
    call.fail("cos and sin should both be there, or neither, and have the same shape [positions, at most %lld]", show(d / 2));
  }
  if (call.failed()) return;
  for (int64_t row = 0; row < job.batch; row++) {
    const int64_t past = job.past[row];
    if (past < 0 || past > job.capacity - job.length) {
      call.fail("%lld entries and %lld new ones exceed the cache's capacity of %lld", show(past), show(job.length), show(job.capacity));
    } else if (job.cos && past + job.length > table.sizes[0]) {
      call.fail("%lld positions; the tables have %lld", show(past + job.length), show(table.sizes[0]));
    } else if (job.bias && past + job.length > bias.last() - kKeys) {
      call.fail("%lld positions; the bias reaches over %lld", show(past + job.length), show(bias.last() - kKeys));
    }
    if (call.failed()) return;
  }
  job.half = job.cos ? table.last() : 0;
  job.reach = job.bias ? bias.last() - kKeys : 0;
  job.query_stride = query.last(), job.key_stride = packed ? query.last() : kv_width;
  if (packed) job.key = job.query + width, job.value = job.key + kv_width;
  query.sizes[2] = width;
  job.output = call.output(query);
  job.key_cache = call.output<char>(caches, 1);
  job.value_cache = call.output<char>(caches, 2);
  if (call.failed()) return;
  const size_t bytes = caches.leading() * job.entry;
  if (bytes && job.key_cache != key_cache) std::memcpy(job.key_cache, key_cache, bytes);  // otherwise they are updated in place
  if (bytes && job.value_cache != value_cache) std::memcpy(job.value_cache, value_cache, bytes);
  if (job.batch == 0 || job.length == 0) return;

  const int64_t queries = job.length * (op.heads / op.kv_heads);
  work.rows = std::min(queries, std::min<int64_t>(kUnitRows, kUnitFloats / d / kRowsTogether * kRowsTogether));
  work.tiles = (queries + work.rows - 1) / work.rows;
  int64_t units = job.batch * op.kv_heads * work.tiles;
  const int64_t numbers = marks ? job.batch * (job.capacity + 1) : 0;
  const int64_t parts_of_keys = units < kFewUnits ? (job.capacity + kSplitKeys - 1) / kSplitKeys : 0;
  void* parts[3];
  if (!call.scratch({numbers * sizeof(int32_t), numbers * sizeof(int32_t), units * parts_of_keys * work.rows * (d + kTile) * sizeof(float)},
                    parts)) {
    return;
  }
  if (marks) {
    auto *before = static_cast<int32_t*>(parts[0]), *position = static_cast<int32_t*>(parts[1]);
    list_present(job, marks, before, position);
    job.before = before, job.position = position;
  }
  int64_t multiplications = 0, longest = 0;
  for (int64_t row = 0; row < job.batch; row++) {
    const int64_t past = job.past[row], seen = job.entries(row, past + job.length / 2 + 1);
    multiplications += 2 * job.length * width * (op.window ? std::min(op.window, seen) : seen);
    longest = std::max(longest, job.entries(row, past + job.length));
  }
  const int64_t most = op.window ? std::min(longest, op.window + work.rows) : longest;
  work.splits = 1, work.keys = most;
  if (units < kFewUnits && most > kSplitKeys) {
    work.keys = kSplitKeys, work.splits = (most + kSplitKeys - 1) / kSplitKeys;
    units *= work.splits;
    work.partial = static_cast<float*>(parts[2]);
  }
  const int64_t tokens = job.batch * job.length;
  call.parallel(tokens * kv_width * 8, tokens, run_append, &work);  // a number costs about as much as eight multiplications
  call.parallel(multiplications * (work.rows + kTurning) / work.rows, units, run_attend, &work);
  if (work.splits > 1 && !call.failed()) merge(work, units);
}

}  // namespace

const Operator cached_attention = {"CachedAttention", kInputs<Type::kFloat>, 11, create,
    [](const void* kernel, Call& call) { compute(kernel, call, false); }, destroy, 3, Type::kFloat, 3};
const Operator quantized_cached_attention = {"QuantizedCachedAttention", kInputs<Type::kByte>, 11, create,
    [](const void* kernel, Call& call) { compute(kernel, call, true); }, destroy, 3, Type::kByte, 3};

}  // namespace dyncomp
