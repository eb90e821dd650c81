// QuantizedLinear: y[t] = W x[t] + bias.
#include <algorithm>

#include "operators.h"

namespace dyncomp {
namespace {

constexpr const char* kName = "QuantizedLinear";
constexpr Input kInputs[] = {{ORT_FLOAT, false}, {ORT_UINT8, false}, {ORT_FLOAT16, false}, {ORT_FLOAT16, true}, {ORT_FLOAT, true}};
constexpr int64_t kTokensOfUnit = 48;

OrtStatus* create(const OrtApi& api, const OrtKernelInfo* info, void** kernel) { return create_matrix_op(api, info, kName, kernel); }

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

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const MatrixOp& op = *static_cast<const MatrixOp*>(kernel);
  Call call(*op.api, context, kName);
  Shape shape;
  Work work = {};
  LinearJob& job = work.job;
  job.input = call.input<float>(0, "x", false, &shape);
  check_last(call, shape, op.columns);
  job.weight = matrix(call, 1, "", op.rows, op.columns, op.bits, op.block, 1);
  job.bias = call.input<float>(4, "bias", true, op.rows);
  if (call.failed()) return call.status();
  const int64_t tokens = job.tokens = shape.leading(), blocks = op.columns / kBlock;
  shape.sizes[shape.rank - 1] = op.rows;
  job.output = call.output(shape);
  void* memory = nullptr;
  if (tokens == 0 || !call.scratch({tokens * blocks * sizeof(Block)}, &memory)) return call.status();
  job.blocks = static_cast<Block*>(memory);
  quantize_tokens(call, job.weight, job.input, tokens, job.blocks);

  work.groups = (tiles_of(op.rows) + kGroup - 1) / kGroup;
  work.tokens = tokens <= 2 * kTokensOfUnit ? tokens : kTokensOfUnit;
  call.parallel(tokens * op.rows * op.columns, work.groups * ((tokens + work.tokens - 1) / work.tokens), run, &work);
  return call.status();
}

}  // namespace

const Operator quantized_linear = {kName, kInputs, 5, create, compute, destroy_matrix_op};

}  // namespace dyncomp
