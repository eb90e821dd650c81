// SparseLinear: y[t] = W keep_large(x[t], thresholds) + bias, W stored input by input; with an activation, of the first half of the rows,
// times the second half.
#include <algorithm>

#include "operators.h"

namespace dyncomp {
namespace {

constexpr const char* kName = "SparseLinear";
constexpr Input kInputs[] = {{Type::kFloat, false}, {Type::kFloat, false}, {Type::kByte, false}, {Type::kHalf, false}, {Type::kHalf, true}, {Type::kFloat, true}};
constexpr int64_t kNone = -1;
constexpr int64_t kParts = 4;  // of one token's inputs: rows of codes are best read whole, so not the outputs are divided among threads

struct Sparse {
  MatrixOp matrix;
  int64_t activation;
};

void* create(Attributes& attributes) {
  const Sparse op = {read_matrix_op(attributes), attributes.integer("activation")};
  if (op.activation < kNone || op.activation > 14) attributes.fail("there is no such activation");
  if (op.activation != kNone && op.matrix.rows % (2 * kTile)) attributes.fail("the rows under an activation should be a multiple of 32");
  return keep(attributes, op);
}

struct Work {
  GatherJob job;
  int64_t rows, units;     // of a unit; that make up all rows
  int64_t tokens, blocks;  // of a unit of several tokens, of one
  float* partial;          // for one token: [parts, rows]
};

void run_one(const void* user, int64_t first, int64_t last) {
  const Work& work = *static_cast<const Work*>(user);
  const InputMatrix& w = work.job.weight;
  for (int64_t i = first; i < last; i++) {
    const int64_t part = i / work.units, row = i % work.units * work.rows, from = part * work.blocks;
    const int64_t to = std::min(from + work.blocks, w.columns / kBlock);
    active->gather_one(work.job, row, std::min(row + work.rows, w.rows), from, to, work.partial + part * w.rows);
  }
}

void run_many(const void* user, int64_t first, int64_t last) {
  const Work& work = *static_cast<const Work*>(user);
  for (int64_t i = first; i < last; i++) {
    const int64_t row = i % work.units * work.rows, from = i / work.units * work.tokens;
    active->gather_many(work.job, row, std::min(row + work.rows, work.job.weight.rows), from, std::min(from + work.tokens, work.job.tokens));
  }
}

int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

void multiply(Call& call, Work& work) {
  const GatherJob& job = work.job;
  const int64_t rows = job.weight.rows, blocks = job.weight.columns / kBlock, multiplications = job.tokens * rows * job.weight.columns;
  if (job.tokens > 1) {
    work.rows = kGatherTile, work.units = parts_of(rows, work.rows), work.tokens = std::min<int64_t>(job.tokens, kGatherTokens);
    return call.parallel(multiplications, work.units * parts_of(job.tokens, work.tokens), run_many, &work);
  }
  work.rows = std::min<int64_t>(kGatherRows, (rows + 127) / 128 * 128), work.units = parts_of(rows, work.rows);
  work.blocks = parts_of(blocks, kParts);
  const int64_t parts = parts_of(blocks, work.blocks);
  call.parallel(multiplications, work.units * parts, run_one, &work);
  for (int64_t i = 0; i < rows && !call.failed(); i++) {
    float sum = job.bias ? job.bias[i] : 0.0f;
    for (int64_t p = 0; p < parts; p++) sum += work.partial[p * rows + i];
    job.output[i] = sum;
  }
}

struct Tokens {
  const float *x, *thresholds;
  int64_t columns;
  float* kept;
};

void keep_large(const void* user, int64_t first, int64_t last) {
  const Tokens& t = *static_cast<const Tokens*>(user);
  for (int64_t i = first; i < last; i++) active->keep_large(t.x + i * t.columns, t.thresholds, t.columns, t.kept + i * t.columns);
}

struct Gated {
  int32_t activation;
  int64_t neurons;
  float *rows, *output;
};

void gate(const void* user, int64_t first, int64_t last) {
  const Gated& g = *static_cast<const Gated*>(user);
  for (int64_t i = first; i < last; i++) active->gate(g.activation, g.rows + i * 2 * g.neurons, g.neurons, g.output + i * g.neurons);
}

InputMatrix input_matrix(Call& call, const MatrixOp& op) {
  InputMatrix m = {};
  m.rows = op.rows, m.columns = op.columns;
  m.bits = static_cast<int32_t>(op.bits), m.block = static_cast<int32_t>(op.block);
  m.padded = (op.rows + 63) / 64 * 64;
  m.stride = m.padded * op.bits / 8;
  const int64_t groups = m.padded * (op.columns / op.block);
  m.codes = call.input<uint8_t>(2, "codes", false, m.stride * op.columns);
  m.scales = call.input<uint16_t>(3, "scales", false, groups);
  m.offsets = call.input<uint16_t>(4, "offsets", true, groups);
  return m;
}

void compute(const void* kernel, Call& call) {
  const auto& [op, activation] = *static_cast<const Sparse*>(kernel);
  Shape shape;
  Work work = {};
  GatherJob& job = work.job;
  Tokens tokens = {call.input<float>(0, "x", false, &shape), call.input<float>(1, "thresholds", false, op.columns), op.columns, nullptr};
  check_last(call, shape, op.columns);
  job.weight = input_matrix(call, op);
  job.bias = call.input<float>(5, "bias", true, op.rows);
  if (call.failed()) return;
  const int64_t count = job.tokens = shape.leading(), neurons = op.rows / 2, blocks = op.columns / kBlock;
  const bool gated = activation != kNone;
  shape.sizes[shape.rank - 1] = gated ? neurons : op.rows;
  float* output = call.output(shape);
  void* parts[4];
  if (call.failed() || count == 0) return;
  const size_t rows = gated ? count * op.rows * sizeof(float) : 0;
  if (!call.scratch({count * op.columns * sizeof(float), count * blocks * sizeof(Block), rows, kParts * op.rows * sizeof(float)}, parts)) return;
  tokens.kept = static_cast<float*>(parts[0]);
  job.blocks = static_cast<Block*>(parts[1]);
  job.output = gated ? static_cast<float*>(parts[2]) : output;
  work.partial = static_cast<float*>(parts[3]);
  call.parallel(count * op.columns * 2, count, keep_large, &tokens);
  Matrix format = {};  // what quantizing depends on
  format.columns = op.columns, format.bits = static_cast<int32_t>(op.bits), format.offsets = job.weight.offsets;
  quantize_tokens(call, format, tokens.kept, count, job.blocks);
  multiply(call, work);
  const Gated last = {static_cast<int32_t>(activation), neurons, job.output, output};
  if (gated) call.parallel(count * op.rows * 16, count, gate, &last);
}

}  // namespace

const Operator sparse_linear = {kName, kInputs, 6, create, compute, [](void* kernel) { delete static_cast<Sparse*>(kernel); }};

}  // namespace dyncomp
