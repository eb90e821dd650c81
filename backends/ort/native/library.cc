// The entry point that ONNX Runtime calls when the library is registered with a session's options.
#include "operators.h"

namespace dyncomp {
namespace {

struct Entry : OrtCustomOp {
  const Operator* operation;
};

const Operator& of(const OrtCustomOp* op) { return *static_cast<const Entry*>(op)->operation; }

Entry entry(const Operator& operation) {
  Entry e = {};
  e.operation = &operation;
  e.version = 16;
  e.GetName = [](const OrtCustomOp* op) { return of(op).name; };
  e.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  e.GetInputType = [](const OrtCustomOp* op, size_t index) { return of(op).inputs[index].type; };
  e.GetInputTypeCount = [](const OrtCustomOp* op) { return of(op).count; };
  e.GetOutputType = [](const OrtCustomOp*, size_t) { return ORT_FLOAT; };
  e.GetOutputTypeCount = [](const OrtCustomOp* op) { return of(op).outputs; };
  e.KernelDestroy = operation.destroy;
  e.GetInputCharacteristic = [](const OrtCustomOp* op, size_t index) {
    return of(op).inputs[index].optional ? ORT_OPTIONAL : ORT_REQUIRED;
  };
  e.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return ORT_REQUIRED; };
  e.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return ORT_MEM_DEFAULT; };
  e.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  e.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  e.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  e.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  e.CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return of(op).create(*api, info, kernel);
  };
  e.KernelComputeV2 = operation.compute;
  return e;
}

}  // namespace
}  // namespace dyncomp

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace dyncomp;
  static const Entry entries[] = {entry(quantized_linear), entry(sparse_linear), entry(quantized_ffn), entry(float_ffn),
                                  entry(quantized_embedding),
                                  entry(cached_attention)};
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) {  // even the oldest table can make a status
    const OrtApi* oldest = base->GetApi(1);
    return oldest ? oldest->CreateStatus(ORT_FAIL, "the operators of dyncomp need ONNX Runtime 1.17 or newer") : nullptr;
  }
  const char* reason = nullptr;
  if (kernels(&reason) == nullptr) return api->CreateStatus(ORT_FAIL, reason);
  OrtCustomOpDomain* domain = nullptr;  // lives as long as the sessions made with these options, which nobody counts: not released
  if (OrtStatus* status = api->CreateCustomOpDomain("dyncomp", &domain)) return status;
  for (const Entry& e : entries) {
    if (OrtStatus* status = api->CustomOpDomain_Add(domain, &e)) return status;
  }
  return api->AddCustomOpDomain(options, domain);
}
