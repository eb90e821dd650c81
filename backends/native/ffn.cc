// QuantizedFFN: y[t] = base[t] + sum over the experts of gates[t, e] * FFN_e(x[t]), computing only those whose gate is not 0;
// and, of one expert, what stands in for it.
#include <algorithm>

#include "routing.h"
#include "stand_in.h"

namespace dyncomp {
namespace {

constexpr const char* kName = "QuantizedFFN";
constexpr Input kInputs[] = {
    {Type::kFloat, false},   {Type::kFloat, true},                       // x, gates
    {Type::kByte, false},   {Type::kHalf, false}, {Type::kHalf, true},  // up_codes, up_scales, up_offsets
    {Type::kFloat, true},                                             // up_bias
    {Type::kByte, false},   {Type::kHalf, false}, {Type::kHalf, true},  // down_codes, down_scales, down_offsets
    {Type::kFloat, true},    {Type::kFloat, true},    {Type::kFloat, true},     // router, router_bias, down_bias
    {Type::kFloat, true},    STAND_IN_INPUTS,                                  // base, and for tokens whose gate is 0
};
constexpr size_t kGates = 1, kStandIn = 13;
struct Ffn {
  Experts experts;
  int64_t bits, block;
  StandIn standin;
};

void* create(Attributes& attributes) {
  const Experts experts = read_experts(attributes);
  const Ffn op = {experts, attributes.integer("bits"), attributes.integer("block"), read_stand_in(attributes, experts.rows)};
  check_format(attributes, op.experts.neurons, op.experts.columns, op.bits, op.block);
  check_format(attributes, op.experts.rows, op.experts.neurons, op.bits, op.block);
  if (op.standin.neurons && op.experts.experts != 1) attributes.fail("something stands in for one of several experts");
  return keep(attributes, op);
}

void run_expand(const void* user, int64_t first, int64_t last) {
  active->expand(*static_cast<const QuantizedFfnJob*>(user), first, last);
}

void run_contract(const void* user, int64_t first, int64_t last) {
  const QuantizedFfnJob& job = *static_cast<const QuantizedFfnJob*>(user);
  active->contract(job, first * kGroup, std::min(last * kGroup, job.down_tiles));
}

// The tokens of the output are job->tokens.
void compute_experts(const Ffn& ffn, Call& call, QuantizedFfnJob* made) {
  const Experts& op = ffn.experts;
  const int64_t bits = ffn.bits, block = ffn.block;
  Shape shape;
  QuantizedFfnJob& job = *made;
  const int64_t up_rows = op.neurons * (op.gated ? 2 : 1);
  job.input = call.input<float>(0, "x", false, &shape);
  check_last(call, shape, op.columns);
  const int64_t tokens = job.tokens = call.failed() ? 0 : shape.leading();
  job.up = matrix(call, 2, "up_", up_rows, op.columns, bits, block, op.experts);
  job.bias = call.input<float>(5, "up_bias", true, op.experts * up_rows);
  job.down = matrix(call, 6, "down_", op.rows, op.neurons, bits, block, op.experts);
  job.down_bias = call.input<float>(11, "down_bias", true, op.rows);
  job.base = call.input<float>(12, "base", true, tokens * op.rows);
  const Routing routing = read_routing(call, op, tokens, kGates, 9);
  if (call.failed()) return;
  shape.sizes[shape.rank - 1] = op.rows;
  job.output = call.output(shape);
  if (call.failed() || tokens == 0) return;

  void* parts[3];
  if (!call.scratch({tokens * (op.columns / kBlock) * sizeof(Block), routing.most * (op.neurons / kBlock) * sizeof(Block),
                     routing.bytes(op)}, parts)) {
    return;
  }
  job.blocks = static_cast<Block*>(parts[0]);
  job.hidden = static_cast<Block*>(parts[1]);
  const Uses uses = list_uses(call, op, routing, job.input, parts[2]);
  if (uses.count == 0) {
    fill_output(job.base, job.down_bias, tokens, op.rows, job.output);
    return;
  }
  describe(op, uses, &job);
  job.chunks = op.neurons / kBlock;
  job.up_tiles = tiles_of(up_rows);
  quantize_tokens(call, job.up, job.input, tokens, job.blocks);
  run_experts(call, job, uses.total(op));
}

void compute(const void* kernel, Call& call) {
  const Ffn& op = *static_cast<const Ffn*>(kernel);
  QuantizedFfnJob job = {};
  compute_experts(op, call, &job);
  if (op.standin.neurons == 0) return;  // its gates are one a token
  add_stand_in(call, op.standin, kStandIn, call.input<float>(kGates, "gates", true, job.tokens), job.tokens, job.output);
}

}  // namespace

void run_experts(Call& call, const QuantizedFfnJob& job, int64_t pairs) {
  call.parallel(pairs * job.up.rows * job.columns, job.used_count * job.chunks, run_expand, &job);
  call.parallel(pairs * job.rows * job.neurons, (job.down_tiles + kGroup - 1) / kGroup, run_contract, &job);
}

const Operator quantized_ffn = {kName, kInputs, kStandIn + kStandInInputs, create, compute,
    [](void* kernel) { delete static_cast<Ffn*>(kernel); }};

}  // namespace dyncomp
