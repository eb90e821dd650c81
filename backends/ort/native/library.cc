// The operators for ONNX Runtime, and the entry point that it calls when the library is registered with a session's options.
#include "abi.h"
#include "operators.h"

namespace dyncomp {
namespace {

class OrtAttributes final : public Attributes {
 public:
  OrtAttributes(const char* op, const OrtApi& api, const OrtKernelInfo* info) : Attributes(op), api_(api), info_(info) {}
  OrtStatus* status() const { return status_; }

 private:
  void raise(const char* message) override { status_ = api_.CreateStatus(ORT_INVALID_ARGUMENT, message); }
  bool read(const char* name, int64_t* value) override { return found(api_.KernelInfoGetAttribute_int64(info_, name, value)); }
  bool read(const char* name, float* value) override { return found(api_.KernelInfoGetAttribute_float(info_, name, value)); }
  bool found(OrtStatus* status) {
    if (status != nullptr) api_.ReleaseStatus(status);
    return status == nullptr;
  }

  const OrtApi& api_;
  const OrtKernelInfo* info_;
  OrtStatus* status_ = nullptr;
};

constexpr size_t kMaxInputs = 24;  // of an operator

// An input that is the same in every call. Asking ONNX Runtime for a tensor's shape takes half a microsecond, and an FFN has ten.
struct Constant {
  Shape shape;
  const void* data = nullptr;  // null: an input that is computed or fed
};

// What ONNX Runtime holds of a node.
struct Node {
  const OrtApi* api;
  const Operator* operation;
  void* kernel;
  Constant constants[kMaxInputs];
};

// The data and shape of a value; data stays as it is after an error, which is returned, and where there are too many dimensions.
OrtStatus* read_tensor(const OrtApi& api, const OrtValue* value, Shape* shape, const void** data) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatus* status = api.GetTensorTypeAndShape(value, &info)) return status;
  OrtStatus* status = api.GetDimensionsCount(info, &shape->rank);
  const bool fits = status == nullptr && shape->rank <= kMaxRank;
  if (fits) status = api.GetDimensions(info, shape->sizes, shape->rank);
  api.ReleaseTensorTypeAndShapeInfo(info);
  if (fits && status == nullptr) status = api.GetTensorMutableData(const_cast<OrtValue*>(value), const_cast<void**>(data));
  return status;
}

class OrtCall final : public Call {
 public:
  OrtCall(const Node& node, OrtKernelContext* context)
      : Call(node.operation->name), api_(*node.api), constants_(node.constants), context_(context) {
    keep(api_.KernelContext_GetInputCount(context, &inputs_));
  }
  OrtStatus* status() const { return status_; }

 private:
  void raise(const char* message) override { status_ = api_.CreateStatus(ORT_INVALID_ARGUMENT, message); }
  bool keep(OrtStatus* status) {
    if (status == nullptr) return true;
    failed_ ? api_.ReleaseStatus(status) : void(status_ = status);
    failed_ = true;
    return false;
  }

  bool tensor(size_t index, const char* name, Shape* shape, const void** data) override {
    if (const Constant& known = constants_[index]; known.data != nullptr) {
      *shape = known.shape, *data = known.data;
      return true;
    }
    const OrtValue* value = nullptr;
    if (index >= inputs_ || !keep(api_.KernelContext_GetInput(context_, index, &value)) || value == nullptr) return false;
    if (keep(read_tensor(api_, value, shape, data)) && shape->rank > kMaxRank) {
      fail("the input %s has %zu dimensions; %zu are allowed", name, shape->rank, kMaxRank);
    }
    return !failed();
  }

  void* result(size_t index, const Shape& shape) override {
    OrtValue* value = nullptr;
    void* pointer = nullptr;
    if (!keep(api_.KernelContext_GetOutput(context_, index, shape.sizes, shape.rank, &value)) || value == nullptr) return nullptr;
    keep(api_.GetTensorMutableData(value, &pointer));
    return pointer;
  }

  void on_threads(size_t count, void (*function)(void*, size_t), void* user) override {
    keep(api_.KernelContext_ParallelFor(context_, function, count, 0, user));
  }

  const OrtApi& api_;
  const Constant* constants_;
  OrtKernelContext* context_;
  size_t inputs_ = 0;
  OrtStatus* status_ = nullptr;
};

struct Entry : OrtCustomOp {
  const Operator* operation;
};

const Operator& of(const OrtCustomOp* op) { return *static_cast<const Entry*>(op)->operation; }

ONNXTensorElementDataType type_of(Type type) {
  switch (type) {
    case Type::kFloat: return ORT_FLOAT;
    case Type::kByte: return ORT_UINT8;
    case Type::kInt64: return ORT_INT64;
    case Type::kHalf: return ORT_FLOAT16;
  }
  __builtin_unreachable();
}

OrtStatus* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** node) {
  OrtAttributes attributes(of(op).name, *api, info);
  void* kernel = of(op).create(attributes);
  if (kernel == nullptr) return attributes.status();
  Node* made = new (std::nothrow) Node{api, &of(op), kernel, {}};
  *node = made;
  if (made == nullptr) {
    of(op).destroy(kernel), attributes.fail("there is no memory left");
    return attributes.status();
  }
  for (size_t i = 0; i < of(op).count; i++) {
    int constant = 0;
    const OrtValue* value = nullptr;
    OrtStatus* status = api->KernelInfoGetConstantInput_tensor(info, i, &constant, &value);
    if (status == nullptr && constant && value) status = read_tensor(*api, value, &made->constants[i].shape, &made->constants[i].data);
    if (status != nullptr) api->ReleaseStatus(status);  // an input left out at the end; or one that the first call says what is wrong with
  }
  return nullptr;
}

OrtStatus* compute(void* data, OrtKernelContext* context) {
  const Node& node = *static_cast<const Node*>(data);
  OrtCall call(node, context);
  node.operation->compute(node.kernel, call);
  return call.status();
}

void destroy(void* data) {
  Node* node = static_cast<Node*>(data);
  node->operation->destroy(node->kernel);
  delete node;
}

Entry entry(const Operator& operation) {
  Entry e = {};
  e.operation = &operation;
  e.version = 16;
  e.GetName = [](const OrtCustomOp* op) { return of(op).name; };
  e.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  e.GetInputType = [](const OrtCustomOp* op, size_t index) { return type_of(of(op).inputs[index].type); };
  e.GetInputTypeCount = [](const OrtCustomOp* op) { return of(op).count; };
  e.GetOutputType = [](const OrtCustomOp* op, size_t index) { return index ? type_of(of(op).later) : ORT_FLOAT; };
  e.GetOutputTypeCount = [](const OrtCustomOp* op) { return of(op).outputs; };
  e.KernelDestroy = destroy;
  e.GetInputCharacteristic = [](const OrtCustomOp* op, size_t index) {
    return of(op).inputs[index].optional ? ORT_OPTIONAL : ORT_REQUIRED;
  };
  e.GetOutputCharacteristic = [](const OrtCustomOp* op, size_t index) {
    return index + of(op).optional >= of(op).outputs ? ORT_OPTIONAL : ORT_REQUIRED;
  };
  e.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return ORT_MEM_DEFAULT; };
  e.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  e.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  e.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  e.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  e.CreateKernelV2 = create;
  e.KernelComputeV2 = compute;
  return e;
}

}  // namespace
}  // namespace dyncomp

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace dyncomp;
  static const Entry entries[] = {entry(quantized_linear), entry(sparse_linear), entry(quantized_ffn), entry(float_ffn),
                                  entry(quantized_embedding), entry(token_gates), entry(norm_gates), entry(cached_attention),
                                  entry(quantized_cached_attention)};
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
