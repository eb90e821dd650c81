// QuantizedFFN: y[t] = sum over the experts of gates[t, e] * FFN_e(x[t]), computing only those whose gate is not 0.
#include <algorithm>
#include <new>

#include "operators.h"

namespace dyncomp {
namespace {

constexpr const char* kName = "QuantizedFFN";
constexpr Input kInputs[] = {
    {ORT_FLOAT, false},   {ORT_FLOAT, true},                       // x, gates
    {ORT_UINT8, false},   {ORT_FLOAT16, false}, {ORT_FLOAT16, true},  // up_codes, up_scales, up_offsets
    {ORT_FLOAT, true},                                             // up_bias
    {ORT_UINT8, false},   {ORT_FLOAT16, false}, {ORT_FLOAT16, true},  // down_codes, down_scales, down_offsets
    {ORT_FLOAT, true},    {ORT_FLOAT, true},    {ORT_FLOAT, true},     // router, router_bias, down_bias
};
constexpr int64_t kActivations = 15;

struct Ffn {
  const OrtApi* api;
  int64_t experts, columns, neurons, rows, gated, activation, bits, block;
};

OrtStatus* create(const OrtApi& api, const OrtKernelInfo* info, void** kernel) {
  Ffn op = {};
  op.api = &api;
  const struct {
    const char* name;
    int64_t* value;
  } attributes[] = {{"experts", &op.experts}, {"columns", &op.columns},       {"neurons", &op.neurons}, {"rows", &op.rows},
                    {"gated", &op.gated},     {"activation", &op.activation}, {"bits", &op.bits},       {"block", &op.block}};
  for (const auto& a : attributes) {
    if (OrtStatus* status = attribute(api, info, a.name, a.value)) return status;
  }
  if (op.experts < 1 || op.experts > INT32_MAX) return error(api, kName, "there must be at least one expert");
  if (op.activation < 0 || op.activation >= kActivations) return error(api, kName, "the activation has no function of that code");
  if (OrtStatus* status = check_format(api, kName, op.neurons, op.columns, op.bits, op.block)) return status;
  if (OrtStatus* status = check_format(api, kName, op.rows, op.neurons, op.bits, op.block)) return status;
  *kernel = new (std::nothrow) Ffn(op);
  return *kernel ? nullptr : error(api, kName, "there is no memory left");
}

struct Work {
  FfnJob job;
  const int32_t* used;  // experts with at least one token
  int64_t chunks;       // groups of 32 neurons of an expert
};

void run_expand(const void* user, int64_t first, int64_t last) {
  const Work& work = *static_cast<const Work*>(user);
  for (int64_t i = first; i < last; i++) active->expand(work.job, work.used[i / work.chunks], i % work.chunks);
}

void run_contract(const void* user, int64_t first, int64_t last) {
  const FfnJob& job = static_cast<const Work*>(user)->job;
  active->contract(job, first * kGroup, std::min(last * kGroup, job.down_tiles));
}

struct Routing {
  const float *x, *router, *bias;
  int64_t experts, columns;
  float* gates;
};

void run_route(const void* user, int64_t first, int64_t last) {
  const Routing& r = *static_cast<const Routing*>(user);
  for (int64_t t = first; t < last; t++) {
    active->route(r.x + t * r.columns, r.router, r.bias, r.experts, r.columns, r.gates + t * r.experts);
  }
}

// Lists the uses by expert; returns the number of experts that are used.
int64_t list_uses(const float* gates, int64_t tokens, int64_t experts, int64_t* starts, int32_t* tokens_of, float* gate_of, int32_t* used) {
  int64_t count = 0, at = 0;
  for (int64_t e = 0; e < experts; e++) {
    starts[e] = at;
    for (int64_t t = 0; t < tokens; t++) {
      const float gate = gates ? gates[t * experts + e] : 1.0f;
      if (gate == 0.0f) continue;
      tokens_of[at] = static_cast<int32_t>(t);
      gate_of[at++] = gate;
    }
    if (at > starts[e]) used[count++] = static_cast<int32_t>(e);
  }
  starts[experts] = at;
  return count;
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const Ffn& op = *static_cast<const Ffn*>(kernel);
  Call call(*op.api, context, kName);
  Shape shape;
  Work work = {};
  FfnJob& job = work.job;
  const int64_t up_rows = op.neurons * (op.gated ? 2 : 1);
  job.input = call.input<float>(0, "x", false, &shape);
  check_last(call, shape, op.columns);
  const int64_t tokens = job.tokens = call.failed() ? 0 : shape.leading();
  const float* gates = call.input<float>(1, "gates", true, tokens * op.experts);
  job.up = matrix(call, 2, "up_", up_rows, op.columns, op.bits, op.block, op.experts);
  job.bias = call.input<float>(5, "up_bias", true, op.experts * up_rows);
  job.down = matrix(call, 6, "down_", op.rows, op.neurons, op.bits, op.block, op.experts);
  const float* router = call.input<float>(9, "router", true, op.experts * op.columns);
  const float* router_bias = call.input<float>(10, "router_bias", true, op.experts);
  job.down_bias = call.input<float>(11, "down_bias", true, op.rows);
  if (call.failed()) return call.status();
  if ((router || router_bias) && (gates || !router || !router_bias)) {
    call.fail("a router comes with its bias, and in place of gates");
    return call.status();
  }
  shape.sizes[shape.rank - 1] = op.rows;
  job.output = call.output(shape);
  if (call.failed() || tokens == 0) return call.status();

  int64_t uses = tokens * op.experts;
  if (gates) uses -= std::count(gates, gates + uses, 0.0f);
  void* parts[7];
  const size_t list = uses * sizeof(int32_t);
  if (!call.scratch({tokens * (op.columns / kBlock) * sizeof(Block), uses * (op.neurons / kBlock) * sizeof(Block),
                     (op.experts + 1) * sizeof(int64_t), op.experts * sizeof(int32_t), list, list, router ? list : 0}, parts)) {
    return call.status();
  }
  job.blocks = static_cast<Block*>(parts[0]);
  job.hidden = static_cast<Block*>(parts[1]);
  int64_t* starts = static_cast<int64_t*>(parts[2]);
  int32_t* used = static_cast<int32_t*>(parts[3]);
  int32_t* tokens_of = static_cast<int32_t*>(parts[4]);
  float* gate_of = static_cast<float*>(parts[5]);
  if (router) {
    const Routing routing = {job.input, router, router_bias, op.experts, op.columns, static_cast<float*>(parts[6])};
    call.parallel(uses * op.columns, tokens, run_route, &routing);
    gates = routing.gates;
  }
  const int64_t used_count = list_uses(gates, tokens, op.experts, starts, tokens_of, gate_of, used);
  work.used = used, work.chunks = op.neurons / kBlock;
  job.starts = starts, job.tokens_of = tokens_of, job.gates = gate_of;
  job.up_tiles = tiles_of(up_rows), job.down_tiles = tiles_of(op.rows);
  job.experts = op.experts, job.neurons = op.neurons;
  job.gated = static_cast<int32_t>(op.gated), job.activation = static_cast<int32_t>(op.activation);
  if (used_count == 0) {
    for (int64_t t = 0; t < tokens; t++) {
      for (int64_t j = 0; j < op.rows; j++) job.output[t * op.rows + j] = job.down_bias ? job.down_bias[j] : 0.0f;
    }
    return call.status();
  }
  uses = starts[op.experts];
  quantize_tokens(call, job.up, job.input, tokens, job.blocks);
  call.parallel(uses * up_rows * op.columns, used_count * work.chunks, run_expand, &work);
  call.parallel(uses * op.rows * op.neurons, (job.down_tiles + kGroup - 1) / kGroup, run_contract, &work);
  return call.status();
}

}  // namespace

const Operator quantized_ffn = {kName, kInputs, 12, create, compute, [](void* kernel) { delete static_cast<Ffn*>(kernel); }};

}  // namespace dyncomp
