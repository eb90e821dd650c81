// QuantizedLinear: y[t] = W x[t] + bias; x rounded to int8, or, with `terms` 2, the sum of two such roundings. Where W are the upper halves
// of codes, the lower ones count in the rows whose product comes within `margin` of the token's largest. With gates, y[t] = gates[t] (W x[t]
// + bias), in the first `gated` rows or in all, and a token whose gate is 0 costs nothing there: when all are, no weight is read. Something
// may stand in for what it skips.
#include <algorithm>

#include "stand_in.h"

namespace dyncomp {
namespace {

constexpr const char* kName = "QuantizedLinear";
constexpr Input kInputs[] = {
    {Type::kFloat, false}, {Type::kByte, false}, {Type::kHalf, false},  // x, codes, scales
    {Type::kHalf, true},   {Type::kFloat, true}, {Type::kByte, true},   // offsets, bias, lower
    {Type::kFloat, true}, STAND_IN_INPUTS,                              // gates, and for tokens whose gate is 0
};
constexpr size_t kGates = 6, kStandIn = 7;
constexpr int64_t kTokensOfUnit = 48;
constexpr int64_t kTokensInTwoTerms = 64;  // that are computed together: bounds the memory for the sums

struct Linear {
  MatrixOp matrix;
  int64_t terms;
  float margin;
  int64_t gated;
  StandIn standin;
};

void* create(Attributes& attributes) {
  Linear op = {read_matrix_op(attributes), attributes.integer("terms"), attributes.number("margin", 0.0f), attributes.integer("gated", 0), {}};
  if (op.terms != 1 && op.terms != 2) attributes.fail("terms should be 1 or 2");
  if (op.gated < 0 || op.gated > op.matrix.rows || op.gated % kTile) {
    attributes.fail("gated is no multiple of 16, or there are not so many rows");
  }
  if (op.gated == 0) op.gated = op.matrix.rows;
  op.standin = read_stand_in(attributes, op.matrix.rows);
  return keep(attributes, op);
}

// A unit of work is a group of tiles for `tokens` tokens; `groups` of them make up the tiles first .. last - 1.
struct Work {
  LinearJob job;
  int64_t first, last, groups, tokens;
};

void run(const void* user, int64_t first, int64_t last) {
  const Work& work = *static_cast<const Work*>(user);
  for (int64_t i = first; i < last; i++) {
    const int64_t tile = work.first + i % work.groups * kGroup, from = i / work.groups * work.tokens;
    active->linear(work.job, tile, std::min(tile + kGroup, work.last), from, std::min(from + work.tokens, work.job.tokens));
  }
}

// The tiles first .. last - 1.
void multiply(Call& call, Work& work, int64_t first, int64_t last) {
  const LinearJob& job = work.job;
  if (job.tokens == 0 || first == last) return;
  work.first = first, work.last = last, work.groups = (last - first + kGroup - 1) / kGroup;
  work.tokens = job.tokens <= 2 * kTokensOfUnit ? job.tokens : kTokensOfUnit;
  const int64_t units = work.groups * ((job.tokens + work.tokens - 1) / work.tokens);
  call.parallel(job.tokens * (last - first) * kTile * job.weight.columns, units, run, &work);
}
void multiply(Call& call, Work& work) { multiply(call, work, 0, tiles_of(work.job.weight.rows)); }

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

// What gates make of the first `rows` of each token's `width` outputs.
struct Gates {
  const float* values;
  float* output;
  int64_t rows, width;
};

void apply(const void* user, int64_t first, int64_t last) {
  const Gates& gates = *static_cast<const Gates*>(user);
  for (int64_t t = first; t < last; t++) {
    const float gate = gates.values[t];
    float* y = gates.output + t * gates.width;
    if (gate == 0.0f) std::fill(y, y + gates.rows, 0.0f);
    for (int64_t n = 0; n < gates.rows && gate != 0.0f && gate != 1.0f; n++) y[n] *= gate;
  }
}

// The first `rows` for the tokens whose gate is not 0, which `open` has room for; what is left of the rows for all.
void under_gates(Call& call, Work& work, const float* gates, int64_t rows, int32_t* open) {
  LinearJob& job = work.job;
  const int64_t tokens = job.tokens, end = tiles_of(rows), last = tiles_of(job.weight.rows);
  int64_t count = 0, ones = 0;
  for (int64_t t = 0; t < tokens; t++) {
    if (gates[t] != 0.0f) open[count++] = static_cast<int32_t>(t);
    ones += gates[t] == 1.0f;
  }
  job.which = open, job.tokens = count;
  if (end < last || count == tokens) {
    quantize_tokens(call, job.weight, job.input, tokens, job.blocks);
  } else {
    quantize_tokens(call, job.weight, job.input, count, job.blocks, open);
  }
  if (ones < tokens) {
    multiply(call, work, 0, end);
    const Gates all = {gates, job.output, rows, job.weight.rows};
    call.parallel(tokens * rows, tokens, apply, &all);
  }
  job.which = nullptr, job.tokens = tokens;
  multiply(call, work, ones < tokens ? end : 0, last);
}

void compute(const void* kernel, Call& call) {
  const auto& [op, terms, margin, gated, standin] = *static_cast<const Linear*>(kernel);
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
  const float* gates = call.input<float>(kGates, "gates", true, tokens);
  if (gates && (terms == 2 || lower.rows)) call.fail("gates belong to one term, without lower halves");
  shape.sizes[shape.rank - 1] = op.rows;
  job.output = call.output(shape);
  if (call.failed() || tokens == 0) return;
  if (terms == 2) {
    in_two_terms(call, work);
    return;
  }
  void* parts[4];
  const size_t numbers = tiles_of(blocks) * kTile * sizeof(float);
  if (!call.scratch({tokens * blocks * sizeof(Block), numbers, numbers, gates ? tokens * sizeof(int32_t) : 0}, parts)) return;
  job.blocks = static_cast<Block*>(parts[0]);
  if (gates) {
    under_gates(call, work, gates, gated, static_cast<int32_t*>(parts[3]));
  } else {
    quantize_tokens(call, job.weight, job.input, tokens, job.blocks);
    multiply(call, work);
  }
  add_stand_in(call, standin, kStandIn, gates, tokens, job.output);
  if (lower.rows) refine(call, job, lower, margin, static_cast<float*>(parts[1]), static_cast<float*>(parts[2]));
}

}  // namespace

const Operator quantized_linear = {kName, kInputs, kStandIn + kStandInInputs, create, compute,
    [](void* kernel) { delete static_cast<Linear*>(kernel); }};

}  // namespace dyncomp
