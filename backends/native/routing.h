// What the operators on experts share: their attributes, and which tokens use which expert.
#pragma once
#include "call.h"

namespace dyncomp {

struct Experts {
  int64_t experts, columns, neurons, rows, gated, activation;
  int64_t k;  // a router opens so many experts for each token; 0: those whose score is positive
};

// Reads the attributes; `k` may be absent, which is 0.
Experts read_experts(Attributes& attributes);

// The routing of one call: gates that are given, or a router [experts, columns] with its bias, or neither: every gate is 1.
struct Routing {
  const float *gates, *router, *bias;
  int64_t tokens;
  int64_t most;  // uses there can be: one token of one expert each

  size_t bytes(const Experts& op) const;  // of the memory `list_uses` needs
};

// Reads `gates` from the input of this index and the router from the two at `router_index`.
Routing read_routing(Call& call, const Experts& op, int64_t tokens, size_t gates_index, size_t router_index);

struct Uses {
  const int64_t* starts;     // [experts + 1]: expert e has the uses starts[e] .. starts[e + 1] - 1
  const int32_t* tokens_of;  // [uses]
  const float* gates;        // [uses]
  const int32_t* used;       // experts with at least one use, `count` of them
  int64_t count;

  int64_t total(const Experts& op) const { return starts[op.experts]; }
};

// Computes gates where there is a router, and lists the uses by expert, each expert's in the order of the tokens.
Uses list_uses(Call& call, const Experts& op, const Routing& routing, const float* x, void* memory);

// What the operator and its uses tell of a job.
void describe(const Experts& op, const Uses& uses, FfnJob* job);

// The output when no expert of any token is open: base [tokens, rows] (zeros when null) and the bias (none when null).
void fill_output(const float* base, const float* bias, int64_t tokens, int64_t rows, float* output);

}  // namespace dyncomp
