// QuantizedLinear: y[t] = W x[t] + bias; x rounded to int8, or, with `terms` 2, the sum of two such roundings. Where W are the upper halves
// of codes, the lower ones count in the rows whose product comes within `margin` of the token's largest. With gates, y[t] = gates[t] (W x[t]
// + bias), and a token whose gate is 0 costs nothing: when all are, no weight is read.
#include <algorithm>

#include "operators.h"

namespace dyncomp {
namespace {

constexpr const char* kName = "QuantizedLinear";
constexpr Input kInputs[] = {
    {Type::kFloat, false}, {Type::kByte, false}, {Type::kHalf, false},  // x, codes, scales
    {Type::kHalf, true},   {Type::kFloat, true}, {Type::kByte, true},   // offsets, bias, lower
    {Type::kFloat, true},                                               // gates
};
constexpr int64_t kTokensOfUnit = 48;
constexpr int64_t kTokensInTwoTerms = 64;  // that are computed together: bounds the memory for the sums

struct Linear {
  MatrixOp matrix;
  int64_t terms;
  float margin;
};

void* create(Attributes& attributes) {
  const Linear op = {read_matrix_op(attributes), attributes.integer("terms"), attributes.number("margin", 0.0f)};
  if (op.terms != 1 && op.terms != 2) attributes.fail("terms should be 1 or 2");
  return keep(attributes, op);
}

// A unit of work is a group of tiles for `tokens` tokens; `groups` of them make up the rows.
struct Work {
  LinearJob job;
  int64_t groups, tokens;
};

void run(const void* user, int64_t first, int64_t last) {
  const Work& work = *static_cast<const Work*>(user);
  for (int64_t i = first; i < last; i++) {
    const int64_t tile = i % work.groups * kGroup, from = i / work.groups * work.tokens;
    const int64_t end = std::min(tile + kGroup, tiles_of(work.job.weight.rows));
    active->linear(work.job, tile, end, from, std::min(from + work.tokens, work.job.tokens));
  }
}

void multiply(Call& call, Work& work) {
  const LinearJob& job = work.job;
  work.groups = (tiles_of(job.weight.rows) + kGroup - 1) / kGroup;
  work.tokens = job.tokens <= 2 * kTokensOfUnit ? job.tokens : kTokensOfUnit;
  call.parallel(job.tokens * job.weight.rows * job.weight.columns, work.groups * ((job.tokens + work.tokens - 1) / work.tokens), run, &work);
}

// What rounding leaves of x: [tokens, columns].
void remainder(const float* x, const Block* blocks, int64_t count, float* rest) {
  for (int64_t b = 0; b < count; b++) {
    for (int64_t i = 0; i < kBlock; i++) rest[b * kBlock + i] = x[b * kBlock + i] - blocks[b].scale * blocks[b].codes[i];
  }
}

struct Sum {
  const float *first, *second, *bias;
  float* output;
  int64_t tokens, rows;
};

void add(const void* user, int64_t from, int64_t to) {
  const Sum& sum = *static_cast<const Sum*>(user);
  for (int64_t t = 0; t < sum.tokens; t++) {
    const int64_t at = t * sum.rows;
    for (int64_t i = from; i < to; i++) sum.output[at + i] = sum.first[at + i] + sum.second[at + i];
    for (int64_t i = from; sum.bias && i < to; i++) sum.output[at + i] += sum.bias[i];
  }
}

// The rounded tokens and what that leaves of them, rounded too, as twice as many tokens; then their sums.
void in_two_terms(Call& call, Work& work) {
  LinearJob& job = work.job;
  const int64_t tokens = job.tokens, columns = job.weight.columns, rows = job.weight.rows, blocks = columns / kBlock;
  const int64_t most = std::min(tokens, kTokensInTwoTerms);
  const float *input = job.input, *bias = job.bias;
  float* output = job.output;
  void* parts[3];
  if (!call.scratch({2 * most * blocks * sizeof(Block), most * columns * sizeof(float), 2 * most * rows * sizeof(float)}, parts)) return;
  job.blocks = static_cast<Block*>(parts[0]);
  job.output = static_cast<float*>(parts[2]);
  job.bias = nullptr;
  for (int64_t t = 0; t < tokens; t += most) {
    const int64_t n = std::min(most, tokens - t);
    const float* x = input + t * columns;
    float* rest = static_cast<float*>(parts[1]);
    quantize_tokens(call, job.weight, x, n, job.blocks);
    remainder(x, job.blocks, n * blocks, rest);
    quantize_tokens(call, job.weight, rest, n, job.blocks + n * blocks);
    job.tokens = 2 * n;
    multiply(call, work);
    const Sum sum = {job.output, job.output + n * rows, bias, output + t * rows, n, rows};
    call.parallel(n * rows * 4, rows, add, &sum);
  }
}

// The rows of a unit: neighbours go to different threads, for likely words often have numbers near each other.
constexpr int64_t kUnits = 16, kStride = 5;

struct Refinement {
  RefineJob job;
  int64_t rows;
};

void refine_units(const void* user, int64_t first, int64_t last) {
  const auto& [job, rows] = *static_cast<const Refinement*>(user);
  const int64_t tiles = tiles_of(rows);
  for (int64_t i = first; i < last; i++) {
    const int64_t unit = i * kStride % kUnits, end = std::min(tiles * (unit + 1) / kUnits * kTile, rows);
    active->refine(job, tiles * unit / kUnits * kTile, end);
  }
}

// Adds the lower halves where they count.
void refine(Call& call, const LinearJob& linear, const LowerHalves& lower, float margin, float* scales, float* middles) {
  const int64_t rows = linear.weight.rows, blocks = lower.columns / kBlock;
  for (int64_t t = 0; t < linear.tokens; t++) {
    Refinement refinement = {{lower, linear.blocks + t * blocks, scales, middles, 0.0f, linear.output + t * rows}, rows};
    RefineJob& job = refinement.job;
    for (int64_t b = 0; b < tiles_of(blocks) * kTile; b++) {
      scales[b] = b < blocks ? job.blocks[b].scale : 0.0f;
      middles[b] = b < blocks ? 7.5f * scales[b] * static_cast<float>(job.blocks[b].correction) : 0.0f;
    }
    job.floor = active->peak(job.output, rows) - margin;
    call.parallel(rows * lower.columns / 8, kUnits, refine_units, &refinement);
  }
}

// The tokens whose gate is not 0: `open`, ascending, are `count` of `tokens`.
struct Gates {
  const float* values;
  int64_t* open;
  int64_t count, tokens;
};

// Only those are rounded, and multiplied as if there were no others.
void quantize_open(Call& call, const Gates& gates, LinearJob& job) {
  struct Rows {
    const Gates& gates;
    const LinearJob& job;
  };
  const Rows rows = {gates, job};
  const auto run = [](const void* user, int64_t first, int64_t last) {
    const auto& [g, j] = *static_cast<const Rows*>(user);
    const int64_t columns = j.weight.columns, blocks = columns / kBlock;
    for (int64_t i = first; i < last; i++) active->quantize(j.weight, j.input + g.open[i] * columns, blocks, j.blocks + i * blocks);
  };
  call.parallel(gates.count * job.weight.columns * 4, gates.count, run, &rows);
}

// Their products lie one after the other where the output begins: from the last on, each to its place, times its gate; zeros elsewhere.
void scatter(Call& call, const Gates& gates, const LinearJob& job) {
  struct Places {
    const Gates& gates;
    float* output;
    int64_t rows;
  };
  const Places places = {gates, job.output, job.weight.rows};
  const auto run = [](const void* user, int64_t from, int64_t to) {
    const auto& [g, output, rows] = *static_cast<const Places*>(user);
    for (int64_t t = g.tokens - 1, i = g.count - 1; t >= 0; t--) {
      float* y = output + t * rows;
      const bool open = i >= 0 && g.open[i] == t;
      const float* product = output + (open ? i : 0) * rows;
      for (int64_t n = from; n < to; n++) y[n] = open ? product[n] * g.values[t] : 0.0f;
      i -= open;
    }
  };
  call.parallel(gates.tokens * job.weight.rows * 4, job.weight.rows, run, &places);
}

void compute(const void* kernel, Call& call) {
  const auto& [op, terms, margin] = *static_cast<const Linear*>(kernel);
  Shape shape;
  Work work = {};
  LinearJob& job = work.job;
  job.input = call.input<float>(0, "x", false, &shape);
  check_last(call, shape, op.columns);
  job.weight = matrix(call, 1, "", op.rows, op.columns, op.bits, op.block, 1);
  job.bias = call.input<float>(4, "bias", true, op.rows);
  const LowerHalves lower = lower_halves(call, 5, op.rows, op.columns, op.block);
  if (lower.rows && (terms == 2 || op.bits != 4 || !job.weight.offsets)) call.fail("lower halves belong to 4 bits with offsets, and one term");
  if (call.failed()) return;
  const int64_t tokens = job.tokens = shape.leading(), blocks = op.columns / kBlock;
  Gates gates = {call.input<float>(6, "gates", true, tokens), nullptr, 0, tokens};
  if (gates.values && (terms == 2 || lower.rows)) call.fail("gates belong to one term, without lower halves");
  shape.sizes[shape.rank - 1] = op.rows;
  job.output = call.output(shape);
  if (call.failed() || tokens == 0) return;
  if (terms == 2) {
    in_two_terms(call, work);
    return;
  }
  void* parts[4];
  const size_t numbers = tiles_of(blocks) * kTile * sizeof(float);
  const size_t places = gates.values ? tokens * sizeof(int64_t) : 0;
  if (!call.scratch({tokens * blocks * sizeof(Block), numbers, numbers, places}, parts)) return;
  job.blocks = static_cast<Block*>(parts[0]);
  if (gates.values) {
    gates.open = static_cast<int64_t*>(parts[3]);
    for (int64_t t = 0; t < tokens; t++) {
      if (gates.values[t] != 0.0f) gates.open[gates.count++] = t;
    }
    if ((job.tokens = gates.count) > 0) {
      quantize_open(call, gates, job);
      multiply(call, work);
    }
    scatter(call, gates, job);
    return;
  }
  quantize_tokens(call, job.weight, job.input, tokens, job.blocks);
  multiply(call, work);
  if (lower.rows) refine(call, job, lower, margin, static_cast<float*>(parts[1]), static_cast<float*>(parts[2]));
}

}  // namespace

const Operator quantized_linear = {kName, kInputs, 7, create, compute, [](void* kernel) { delete static_cast<Linear*>(kernel); }};

}  // namespace dyncomp
