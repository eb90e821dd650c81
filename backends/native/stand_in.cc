#include "stand_in.h"

#include <algorithm>

namespace dyncomp {

StandIn read_stand_in(Attributes& attributes, int64_t rows) {
  StandIn op = {0, attributes.integer("standin_neurons", 0), rows, 0, 0};
  if (op.neurons == 0) return op;
  op.columns = attributes.integer("standin_columns"), op.bits = attributes.integer("standin_bits");
  op.block = attributes.integer("standin_block");
  check_format(attributes, op.neurons, op.columns, op.bits, op.block);
  check_format(attributes, op.rows, op.neurons, op.bits, op.block);
  return op;
}

void add_stand_in(Call& call, const StandIn& op, size_t index, const float* gates, int64_t tokens, float* output) {
  if (op.neurons == 0 || call.failed()) return;
  if (!gates) return call.fail("what stands in for skipped tokens needs gates");
  const int64_t closed = std::count(gates, gates + tokens, 0.0f);
  if (closed == 0) return;
  QuantizedFfnJob job = {};
  job.input = call.input<float>(index, "standin_x", false, tokens * op.columns);
  job.up = matrix(call, index + 1, "standin_up_", op.neurons, op.columns, op.bits, op.block, 1);
  job.bias = call.input<float>(index + 4, "standin_up_bias", true, op.neurons);
  job.down = matrix(call, index + 5, "standin_down_", op.rows, op.neurons, op.bits, op.block, 1);
  void* parts[4];
  if (!call.scratch({tokens * (op.columns / kBlock) * sizeof(Block), closed * (op.neurons / kBlock) * sizeof(Block),
                     closed * sizeof(int32_t), closed * sizeof(float)}, parts)) {
    return;
  }
  int32_t* which = static_cast<int32_t*>(parts[2]);
  float* ones = static_cast<float*>(parts[3]);
  for (int64_t t = 0, n = 0; t < tokens; t++) {
    if (gates[t] == 0.0f) which[n++] = static_cast<int32_t>(t);
  }
  std::fill(ones, ones + closed, 1.0f);
  const int64_t starts[2] = {0, closed};
  const int32_t used = 0;
  job.blocks = static_cast<Block*>(parts[0]), job.hidden = static_cast<Block*>(parts[1]);
  job.starts = starts, job.tokens_of = which, job.gates = ones, job.used = &used, job.used_count = 1;
  job.columns = op.columns, job.neurons = op.neurons, job.rows = op.rows, job.chunks = op.neurons / kBlock;
  job.up_tiles = tiles_of(op.neurons), job.down_tiles = tiles_of(op.rows);
  job.output = output, job.tokens = tokens, job.add = true;
  quantize_tokens(call, job.up, job.input, closed, job.blocks, which);
  run_experts(call, job, closed);
}

}  // namespace dyncomp
