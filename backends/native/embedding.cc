// QuantizedEmbedding: rows of a quantized matrix by number, as floats; its codes may be upper halves, the lower ones beside them.
#include "operators.h"

namespace dyncomp {
namespace {

constexpr const char* kName = "QuantizedEmbedding";
constexpr Input kInputs[] = {{Type::kInt64, false}, {Type::kByte, false}, {Type::kHalf, false}, {Type::kHalf, true}, {Type::kByte, true}};

void* create(Attributes& attributes) { return keep(attributes, read_matrix_op(attributes)); }

struct Rows {
  Matrix weight;
  LowerHalves lower;
  const int64_t* ids;
  float* output;
};

void run(const void* user, int64_t first, int64_t last) {
  const Rows& r = *static_cast<const Rows*>(user);
  for (int64_t i = first; i < last; i++) {
    float* output = r.output + i * r.weight.columns;
    active->decode(r.weight, r.ids[i], output);
    if (r.lower.rows) active->decode_lower(r.lower, r.ids[i], output);
  }
}

void compute(const void* kernel, Call& call) {
  const MatrixOp& op = *static_cast<const MatrixOp*>(kernel);
  Shape shape;
  Rows r = {};
  r.ids = call.input<int64_t>(0, "ids", false, &shape);
  r.weight = matrix(call, 1, "", op.rows, op.columns, op.bits, op.block, 1);
  r.lower = lower_halves(call, 4, op.rows, op.columns, op.block);
  if (!call.failed() && shape.rank == kMaxRank) call.fail("ids has %zu dimensions; %zu are allowed", shape.rank, kMaxRank - 1);
  if (call.failed()) return;
  const int64_t count = shape.count();
  for (int64_t i = 0; i < count; i++) {
    if (r.ids[i] < 0 || r.ids[i] >= op.rows) {
      call.fail("the id %lld is not in 0 .. %lld", static_cast<long long>(r.ids[i]), static_cast<long long>(op.rows - 1));
      return;
    }
  }
  shape.sizes[shape.rank++] = op.columns;
  r.output = call.output(shape);
  if (!call.failed()) call.parallel(count * op.columns * 4, count, run, &r);
}

}  // namespace

const Operator quantized_embedding = {kName, kInputs, 5, create, compute, [](void* kernel) { delete static_cast<MatrixOp*>(kernel); }};

}  // namespace dyncomp
