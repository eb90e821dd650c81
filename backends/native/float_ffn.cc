// FloatFFN: y[t] = base[t] + sum over the experts of gates[t, e] * FFN_e(x[t]), weights in float32, computing only those whose gate is not 0.
#include <algorithm>

#include "operators.h"
#include "routing.h"

namespace dyncomp {
namespace {

constexpr const char* kName = "FloatFFN";
constexpr Input kInputs[] = {
    {Type::kFloat, false}, {Type::kFloat, true},                      // x, gates
    {Type::kFloat, false}, {Type::kFloat, true},                   // up, up_bias
    {Type::kFloat, false}, {Type::kFloat, true},  {Type::kFloat, true},  // down, router, router_bias
    {Type::kFloat, true},  {Type::kFloat, true},                // down_bias, base
};

void* create(Attributes& attributes) { return keep(attributes, read_experts(attributes)); }

void run_expand(const void* user, int64_t first, int64_t last) {
  active->expand_floats(*static_cast<const FloatFfnJob*>(user), first, last);
}

void run_contract(const void* user, int64_t first, int64_t last) {
  const FloatFfnJob& job = *static_cast<const FloatFfnJob*>(user);
  active->contract_floats(job, first * kWide, std::min(last * kWide, job.down_tiles));
}

void compute(const void* kernel, Call& call) {
  const Experts& op = *static_cast<const Experts*>(kernel);
  Shape shape;
  FloatFfnJob job = {};
  const int64_t parts_of_up = op.gated ? 2 : 1, chunk = kWide / parts_of_up * kTile;
  job.input = call.input<float>(0, "x", false, &shape);
  check_last(call, shape, op.columns);
  const int64_t tokens = job.tokens = call.failed() ? 0 : shape.leading();
  job.up_tiles = parts_of_up * tiles_of(op.neurons);
  job.up = call.input<float>(2, "up", false, op.experts * job.up_tiles * op.columns * kTile);
  job.bias = call.input<float>(3, "up_bias", true, op.experts * parts_of_up * op.neurons);
  job.down = call.input<float>(4, "down", false, op.experts * tiles_of(op.rows) * op.neurons * kTile);
  job.down_bias = call.input<float>(7, "down_bias", true, op.rows);
  job.base = call.input<float>(8, "base", true, tokens * op.rows);
  const Routing routing = read_routing(call, op, tokens, 1, 5);
  if (call.failed()) return;
  shape.sizes[shape.rank - 1] = op.rows;
  job.output = call.output(shape);
  if (call.failed() || tokens == 0) return;

  job.chunks = (op.neurons + chunk - 1) / chunk;
  void* parts[2];
  if (!call.scratch({routing.most * job.chunks * chunk * sizeof(float), routing.bytes(op)}, parts)) return;
  job.hidden = static_cast<float*>(parts[0]);
  const Uses uses = list_uses(call, op, routing, job.input, parts[1]);
  if (uses.count == 0) {
    fill_output(job.base, job.down_bias, tokens, op.rows, job.output);
    return;
  }
  describe(op, uses, &job);
  call.parallel(uses.total(op) * parts_of_up * op.neurons * op.columns, uses.count * job.chunks, run_expand, &job);
  call.parallel(uses.total(op) * op.rows * op.neurons, (job.down_tiles + kWide - 1) / kWide, run_contract, &job);
}

}  // namespace

const Operator float_ffn = {kName, kInputs, 9, create, compute, [](void* kernel) { delete static_cast<Experts*>(kernel); }};

}  // namespace dyncomp
