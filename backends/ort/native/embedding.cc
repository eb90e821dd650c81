// QuantizedEmbedding: rows of a quantized matrix by number, as floats.
#include "operators.h"

namespace dyncomp {
namespace {

constexpr const char* kName = "QuantizedEmbedding";
constexpr Input kInputs[] = {{ORT_INT64, false}, {ORT_UINT8, false}, {ORT_FLOAT16, false}, {ORT_FLOAT16, true}};

OrtStatus* create(const OrtApi& api, const OrtKernelInfo* info, void** kernel) { return create_matrix_op(api, info, kName, kernel); }

struct Rows {
  Matrix weight;
  const int64_t* ids;
  float* output;
};

void run(const void* user, int64_t first, int64_t last) {
  const Rows& r = *static_cast<const Rows*>(user);
  for (int64_t i = first; i < last; i++) active->decode(r.weight, r.ids[i], r.output + i * r.weight.columns);
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const MatrixOp& op = *static_cast<const MatrixOp*>(kernel);
  Call call(*op.api, context, kName);
  Shape shape;
  Rows r = {};
  r.ids = call.input<int64_t>(0, "ids", false, &shape);
  r.weight = matrix(call, 1, "", op.rows, op.columns, op.bits, op.block, 1);
  if (!call.failed() && shape.rank == kMaxRank) call.fail("ids has %zu dimensions; %zu are allowed", shape.rank, kMaxRank - 1);
  if (call.failed()) return call.status();
  const int64_t count = shape.count();
  for (int64_t i = 0; i < count; i++) {
    if (r.ids[i] < 0 || r.ids[i] >= op.rows) {
      call.fail("the id %lld is not in 0 .. %lld", static_cast<long long>(r.ids[i]), static_cast<long long>(op.rows - 1));
      return call.status();
    }
  }
  shape.sizes[shape.rank++] = op.columns;
  r.output = call.output(shape);
  if (!call.failed()) call.parallel(count * op.columns * 4, count, run, &r);
  return call.status();
}

}  // namespace

const Operator quantized_embedding = {kName, kInputs, 4, create, compute, destroy_matrix_op};

}  // namespace dyncomp
