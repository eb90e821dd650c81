#include "routing.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace dyncomp {
namespace {

constexpr int64_t kActivations = 15;

size_t aligned(size_t size) { return (size + 63) / 64 * 64; }

// In the order of the scores; -0 equals 0, and a NaN is larger than all numbers, as in torch.topk.
int32_t rank_of(float score) {
  int32_t bits;
  score += 0.0f;
  std::memcpy(&bits, &score, sizeof bits);
  return score != score ? INT32_MAX : bits < 0 ? bits ^ INT32_MAX : bits;
}

// Scores -> gates, in place: 1 for the k best, of equal ones the first. The k-th rank is found bit by bit, which has no branches to guess.
void open_best(float* scores, int64_t experts, int64_t k, int32_t* ranks) {
  for (int64_t e = 0; e < experts; e++) ranks[e] = rank_of(scores[e]);
  const auto count = [&](int32_t from) {
    int32_t n = 0;
    for (int64_t e = 0; e < experts; e++) n += ranks[e] >= from;
    return n;
  };
  uint32_t found = 0;
  for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
    if (count(static_cast<int32_t>((found | bit) ^ 1u << 31)) >= k) found |= bit;
  }
  const int32_t last = static_cast<int32_t>(found ^ 1u << 31);
  int64_t equal = k;
  for (int64_t e = 0; e < experts; e++) equal -= ranks[e] > last;
  for (int64_t e = 0; e < experts; e++) scores[e] = ranks[e] > last || (ranks[e] == last && equal-- > 0) ? 1.0f : 0.0f;
}

struct Job {
  const float *x, *router, *bias;
  int64_t experts, columns;
  float* scores;
};

void run_route(const void* user, int64_t first, int64_t last) {
  const Job& j = *static_cast<const Job*>(user);
  active->route(j.x + first * j.columns, j.router, j.bias, j.experts, j.columns, last - first, j.scores + first * j.experts);
}

}  // namespace

Experts read_experts(Attributes& attributes) {
  Experts op = {};
  op.experts = attributes.integer("experts"), op.columns = attributes.integer("columns"), op.neurons = attributes.integer("neurons");
  op.rows = attributes.integer("rows"), op.gated = attributes.integer("gated"), op.activation = attributes.integer("activation");
  op.k = attributes.integer("k", 0);
  for (int64_t size : {op.experts, op.columns, op.neurons, op.rows}) {
    if (size < 1 || size > INT32_MAX) attributes.fail("experts, columns, neurons and rows should be positive");
  }
  if (op.activation < 0 || op.activation >= kActivations) attributes.fail("the activation has no function of that code");
  if (op.k < 0 || op.k > op.experts) attributes.fail("k is negative, or there are not so many experts");
  return op;
}

size_t Routing::bytes(const Experts& op) const {
  const size_t ranks = op.k ? op.experts * sizeof(int32_t) : 0, scores = router ? tokens * op.experts * sizeof(float) : 0;
  return aligned((op.experts + 1) * sizeof(int64_t)) + aligned(op.experts * sizeof(int32_t)) + aligned(most * sizeof(int32_t)) +
         aligned(most * sizeof(float)) + aligned(scores) + aligned(ranks);
}

Routing read_routing(Call& call, const Experts& op, int64_t tokens, size_t gates_index, size_t router_index) {
  Routing r = {};
  r.tokens = tokens;
  r.gates = call.input<float>(gates_index, "gates", true, tokens * op.experts);
  r.router = call.input<float>(router_index, "router", true, op.experts * op.columns);
  r.bias = call.input<float>(router_index + 1, "router_bias", true, op.experts);
  if ((r.router || r.bias) && (r.gates || !r.router || !r.bias)) call.fail("a router comes with its bias, and in place of gates");
  r.most = tokens * (r.router && op.k ? op.k : op.experts);
  if (r.gates && !call.failed()) r.most -= std::count(r.gates, r.gates + r.most, 0.0f);
  return r;
}

Uses list_uses(Call& call, const Experts& op, const Routing& routing, const float* x, void* memory) {
  const int64_t tokens = routing.tokens, experts = op.experts;
  char* at = static_cast<char*>(memory);
  const auto take = [&at](size_t size) { return std::exchange(at, at + aligned(size)); };
  int64_t* starts = reinterpret_cast<int64_t*>(take((experts + 1) * sizeof(int64_t)));
  int32_t* used = reinterpret_cast<int32_t*>(take(experts * sizeof(int32_t)));
  int32_t* tokens_of = reinterpret_cast<int32_t*>(take(routing.most * sizeof(int32_t)));
  float* gate_of = reinterpret_cast<float*>(take(routing.most * sizeof(float)));
  const float* gates = routing.gates;
  if (routing.router) {
    float* scores = reinterpret_cast<float*>(take(tokens * experts * sizeof(float)));
    const Job job = {x, routing.router, routing.bias, experts, op.columns, scores};
    call.parallel(tokens * experts * op.columns, tokens, run_route, &job);
    for (int64_t t = 0; t < tokens && op.k; t++) open_best(scores + t * experts, experts, op.k, reinterpret_cast<int32_t*>(at));
    for (int64_t i = 0; i < tokens * experts && !op.k; i++) scores[i] = scores[i] > 0.0f ? 1.0f : 0.0f;
    gates = scores;
  }
  // Counted first, then placed: both passes read the gates in the order they lie in.
  std::fill(starts, starts + experts + 1, 0);
  const auto gate = [&](int64_t i) { return gates ? gates[i] : 1.0f; };
  for (int64_t t = 0, i = 0; t < tokens; t++) {
    for (int64_t e = 0; e < experts; e++, i++) starts[e] += gate(i) != 0.0f;
  }
  int64_t total = 0, count = 0;
  for (int64_t e = 0; e < experts; e++) {
    if (starts[e]) used[count++] = static_cast<int32_t>(e);
    total += std::exchange(starts[e], total);
  }
  for (int64_t t = 0, i = 0; t < tokens; t++) {
    for (int64_t e = 0; e < experts; e++, i++) {
      if (gate(i) == 0.0f) continue;
      tokens_of[starts[e]] = static_cast<int32_t>(t);
      gate_of[starts[e]++] = gate(i);
    }
  }
  for (int64_t e = experts; e > 0; e--) starts[e] = starts[e - 1];  // placing moved each start to the next one
  starts[0] = 0;
  return {starts, tokens_of, gate_of, used, count};
}

void describe(const Experts& op, const Uses& uses, FfnJob* job) {
  job->starts = uses.starts, job->tokens_of = uses.tokens_of, job->gates = uses.gates;
  job->used = uses.used, job->used_count = uses.count;
  job->columns = op.columns, job->neurons = op.neurons, job->rows = op.rows;
  job->gated = static_cast<int32_t>(op.gated), job->activation = static_cast<int32_t>(op.activation);
  job->down_tiles = tiles_of(op.rows);
}

void fill_output(const float* base, const float* bias, int64_t tokens, int64_t rows, float* output) {
  if (base) {
    std::copy(base, base + tokens * rows, output);
  } else {
    std::fill(output, output + tokens * rows, 0.0f);
  }
  for (int64_t t = 0; t < tokens && bias; t++, output += rows) {
    for (int64_t n = 0; n < rows; n++) output[n] += bias[n];
  }
}

}  // namespace dyncomp
