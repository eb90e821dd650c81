// TokenGates: 1 for the tokens whose score weight . x[t] + bias (+ first[t]) is positive, 0 for the others; and one less that.
#include "operators.h"

namespace dyncomp {
namespace {

constexpr const char* kName = "TokenGates";
constexpr Input kInputs[] = {{Type::kFloat, false}, {Type::kFloat, false}, {Type::kFloat, false}, {Type::kFloat, true}};

struct Gate {
  int64_t columns;
};

void* create(Attributes& attributes) { return keep(attributes, Gate{attributes.integer("columns")}); }

constexpr int64_t kLanes = 16;  // sums side by side, which the compiler keeps in vector registers

float score(const float* x, const float* weight, int64_t columns) {
  float sums[kLanes] = {}, total = 0.0f;
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; lane++) sums[lane] += x[i + lane] * weight[i + lane];
  }
  for (; i < columns; i++) sums[i % kLanes] += x[i] * weight[i];
  for (float sum : sums) total += sum;
  return total;
}

void compute(const void* kernel, Call& call) {
  const int64_t columns = static_cast<const Gate*>(kernel)->columns;
  Shape shape, positions;
  const float* x = call.input<float>(0, "x", false, &shape);
  check_last(call, shape, columns);
  const float* weight = call.input<float>(1, "weight", false, columns);
  const float* bias = call.input<float>(2, "bias", false, 1);
  const float* first = call.input<float>(3, "first", true, &positions);
  if (call.failed()) return;
  const int64_t tokens = shape.leading(), length = first ? positions.count() : 1;
  if (tokens && (length == 0 || tokens % length)) {
    call.fail("first has %lld elements for %lld tokens", static_cast<long long>(length), static_cast<long long>(tokens));
  }
  shape.sizes[shape.rank - 1] = 1;
  float *gates = call.output<float>(shape, 0), *closed = call.output<float>(shape, 1);
  if (call.failed()) return;
  for (int64_t t = 0; t < tokens; t++) {
    const float s = score(x + t * columns, weight, columns) + *bias + (first ? first[t % length] : 0.0f);
    gates[t] = s > 0.0f ? 1.0f : 0.0f;
    closed[t] = 1.0f - gates[t];
  }
}

}  // namespace

const Operator token_gates = {kName, kInputs, 4, create, compute, [](void* kernel) { delete static_cast<Gate*>(kernel); }, 2};

}  // namespace dyncomp
