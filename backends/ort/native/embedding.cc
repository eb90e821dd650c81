// QuantizedEmbedding: rows of a quantized matrix by number, as floats.
#include <algorithm>
#include <new>

#include "operators.h"

namespace dyncomp {
namespace {

constexpr const char* kName = "QuantizedEmbedding";
constexpr Input kInputs[] = {{ORT_INT64, false}, {ORT_UINT8, false}, {ORT_FLOAT16, false}, {ORT_FLOAT16, true}};

struct Embedding {
  const OrtApi* api;
  int64_t rows, columns, bits, block;
};

OrtStatus* create(const OrtApi& api, const OrtKernelInfo* info, void** kernel) {
  Embedding op = {&api, 0, 0, 0, 0};
  OrtStatus* status = nullptr;
  if ((status = attribute(api, info, "rows", &op.rows)) || (status = attribute(api, info, "columns", &op.columns)) ||
      (status = attribute(api, info, "bits", &op.bits)) || (status = attribute(api, info, "block", &op.block)) ||
      (status = check_format(api, kName, op.rows, op.columns, op.bits, op.block))) {
    return status;
  }
  *kernel = new (std::nothrow) Embedding(op);
  return *kernel ? nullptr : error(api, kName, "there is no memory left");
}

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
  const Embedding& op = *static_cast<const Embedding*>(kernel);
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

const Operator quantized_embedding = {kName, kInputs, 4, create, compute, [](void* kernel) { delete static_cast<Embedding*>(kernel); }};

}  // namespace dyncomp
