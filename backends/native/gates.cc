// TokenGates: 1 for the tokens whose score weight . x[t] + bias (+ first[t]) is positive, 0 for the others; and, where it is read, one less
// that. NormGates: the same for x[t] = RMSNorm(a[t] + b[t]), which it gives as well, and the sum.
#include <cmath>

#include "operators.h"

namespace dyncomp {
namespace {

constexpr Input kInputs[] = {{Type::kFloat, false}, {Type::kFloat, false}, {Type::kFloat, false}, {Type::kFloat, true}};
constexpr Input kNormInputs[] = {
    {Type::kFloat, false}, {Type::kFloat, false}, {Type::kFloat, false},  // a, b, scale
    {Type::kFloat, false}, {Type::kFloat, false}, {Type::kFloat, true},   // weight, bias, first
};

struct Gate {
  int64_t columns;
  float epsilon;
};

constexpr int64_t kLanes = 16;  // sums side by side, which the compiler keeps in vector registers

float dot(const float* x, const float* y, int64_t columns) {
  float sums[kLanes] = {}, total = 0.0f;
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; lane++) sums[lane] += x[i + lane] * y[i + lane];
  }
  for (; i < columns; i++) sums[i % kLanes] += x[i] * y[i];
  for (float sum : sums) total += sum;
  return total;
}

struct Job {
  const float *a, *b, *scale;  // of the norm; null without one
  const float *x, *weight, *bias, *first;
  int64_t columns, length;  // length: of first
  float epsilon;
  float *gates, *closed, *normed, *sum;
};

void norm(const Job& job, int64_t t) {
  const float *a = job.a + t * job.columns, *b = job.b + t * job.columns;
  float *__restrict y = job.normed + t * job.columns, *__restrict sum = job.sum + t * job.columns;
  for (int64_t i = 0; i < job.columns; i++) sum[i] = a[i] + b[i];
  const float factor = 1.0f / std::sqrt(dot(sum, sum, job.columns) / static_cast<float>(job.columns) + job.epsilon);
  for (int64_t i = 0; i < job.columns; i++) y[i] = sum[i] * factor * job.scale[i];
}

void run(const void* user, int64_t from, int64_t to) {
  const Job& job = *static_cast<const Job*>(user);
  for (int64_t t = from; t < to; t++) {
    if (job.a) norm(job, t);
    const float s = dot(job.x + t * job.columns, job.weight, job.columns) + *job.bias + (job.first ? job.first[t % job.length] : 0.0f);
    job.gates[t] = s > 0.0f ? 1.0f : 0.0f;
    if (job.closed) job.closed[t] = 1.0f - job.gates[t];
  }
}

// The router is in the inputs router .. router + 2, the outputs come in the order gates, normed, sum, closed.
void route(Call& call, Job& job, Shape shape, size_t router) {
  Shape positions;
  job.weight = call.input<float>(router, "weight", false, job.columns);
  job.bias = call.input<float>(router + 1, "bias", false, 1);
  job.first = call.input<float>(router + 2, "first", true, &positions);
  if (call.failed()) return;
  const int64_t tokens = shape.leading();
  job.length = job.first ? positions.count() : 1;
  if (tokens && (job.length == 0 || tokens % job.length)) {
    call.fail("first has %lld elements for %lld tokens", static_cast<long long>(job.length), static_cast<long long>(tokens));
  }
  if (job.a) job.normed = call.output<float>(shape, 1), job.sum = call.output<float>(shape, 2), job.x = job.normed;
  shape.sizes[shape.rank - 1] = 1;
  job.gates = call.output<float>(shape, 0), job.closed = call.output<float>(shape, job.a ? 3 : 1);
  call.parallel(tokens * job.columns * (job.a ? 4 : 1), tokens, run, &job);
}

void compute(const void* kernel, Call& call) {
  Shape shape;
  Job job = {};
  job.columns = static_cast<const Gate*>(kernel)->columns;
  job.x = call.input<float>(0, "x", false, &shape);
  check_last(call, shape, job.columns);
  route(call, job, shape, 1);
}

void compute_with_norm(const void* kernel, Call& call) {
  Shape shape;
  Job job = {};
  job.columns = static_cast<const Gate*>(kernel)->columns, job.epsilon = static_cast<const Gate*>(kernel)->epsilon;
  job.a = call.input<float>(0, "a", false, &shape);
  check_last(call, shape, job.columns);
  job.b = call.failed() ? nullptr : call.input<float>(1, "b", false, shape.count());
  job.scale = call.input<float>(2, "scale", false, job.columns);
  route(call, job, shape, 3);
}

void* create(Attributes& attributes) { return keep(attributes, Gate{attributes.integer("columns"), attributes.number("epsilon", 0.0f)}); }

void destroy(void* kernel) { delete static_cast<Gate*>(kernel); }

}  // namespace

const Operator token_gates = {"TokenGates", kInputs, 4, create, compute, destroy, 2, Type::kFloat, 0, 1};
const Operator norm_gates = {"NormGates", kNormInputs, 6, create, compute_with_norm, destroy, 4, Type::kFloat, 0, 1};

}  // namespace dyncomp
