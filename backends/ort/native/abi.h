// The part of ONNX Runtime's C ABI that this library uses. The ABI is stable: a table of functions that only grows at its end, and one
// struct of callbacks. Declared here because no Python package brings the headers.
#pragma once
#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtValue;
struct OrtSessionOptions;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtCustomOpDomain;
struct OrtCustomOp;

enum OrtErrorCode : int { ORT_OK = 0, ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum ONNXTensorElementDataType : int { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT64 = 7, ORT_FLOAT16 = 10 };
enum OrtCustomOpInputOutputCharacteristic : int { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };
enum OrtMemType : int { ORT_MEM_DEFAULT = 0 };

// The API version asked for: the first with KernelContext_ParallelFor.
constexpr uint32_t kApiVersion = 17;

// The function table, as an array of slots; each member function calls one of them. Slot numbers never change.
struct OrtApi {
  const void* slots[275];

  template <typename Function>
  Function slot(int index) const {
    return reinterpret_cast<Function>(const_cast<void*>(slots[index]));
  }
  OrtStatus* CreateStatus(OrtErrorCode code, const char* message) const {
    return slot<OrtStatus* (*)(OrtErrorCode, const char*)>(0)(code, message);
  }
  OrtStatus* CreateCustomOpDomain(const char* domain, OrtCustomOpDomain** out) const {
    return slot<OrtStatus* (*)(const char*, OrtCustomOpDomain**)>(26)(domain, out);
  }
  OrtStatus* CustomOpDomain_Add(OrtCustomOpDomain* domain, const OrtCustomOp* op) const {
    return slot<OrtStatus* (*)(OrtCustomOpDomain*, const OrtCustomOp*)>(27)(domain, op);
  }
  OrtStatus* AddCustomOpDomain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
    return slot<OrtStatus* (*)(OrtSessionOptions*, OrtCustomOpDomain*)>(28)(options, domain);
  }
  OrtStatus* GetTensorMutableData(OrtValue* value, void** out) const {
    return slot<OrtStatus* (*)(OrtValue*, void**)>(51)(value, out);
  }
  OrtStatus* GetDimensionsCount(const OrtTensorTypeAndShapeInfo* info, size_t* out) const {
    return slot<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, size_t*)>(61)(info, out);
  }
  OrtStatus* GetDimensions(const OrtTensorTypeAndShapeInfo* info, int64_t* values, size_t count) const {
    return slot<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>(62)(info, values, count);
  }
  OrtStatus* GetTensorTypeAndShape(const OrtValue* value, OrtTensorTypeAndShapeInfo** out) const {
    return slot<OrtStatus* (*)(const OrtValue*, OrtTensorTypeAndShapeInfo**)>(65)(value, out);
  }
  OrtStatus* KernelInfoGetAttribute_float(const OrtKernelInfo* info, const char* name, float* out) const {
    return slot<OrtStatus* (*)(const OrtKernelInfo*, const char*, float*)>(85)(info, name, out);
  }
  OrtStatus* KernelInfoGetAttribute_int64(const OrtKernelInfo* info, const char* name, int64_t* out) const {
    return slot<OrtStatus* (*)(const OrtKernelInfo*, const char*, int64_t*)>(86)(info, name, out);
  }
  OrtStatus* KernelContext_GetInputCount(const OrtKernelContext* context, size_t* out) const {
    return slot<OrtStatus* (*)(const OrtKernelContext*, size_t*)>(88)(context, out);
  }
  OrtStatus* KernelContext_GetInput(const OrtKernelContext* context, size_t index, const OrtValue** out) const {
    return slot<OrtStatus* (*)(const OrtKernelContext*, size_t, const OrtValue**)>(90)(context, index, out);
  }
  OrtStatus* KernelContext_GetOutput(OrtKernelContext* context, size_t index, const int64_t* shape, size_t rank, OrtValue** out) const {
    return slot<OrtStatus* (*)(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>(91)(context, index, shape, rank, out);
  }
  void ReleaseStatus(OrtStatus* status) const { slot<void (*)(OrtStatus*)>(93)(status); }
  void ReleaseTensorTypeAndShapeInfo(OrtTensorTypeAndShapeInfo* info) const {
    slot<void (*)(OrtTensorTypeAndShapeInfo*)>(99)(info);
  }
  // The value of an input that is an initializer; `*constant` is 0 for one that is computed or fed.
  OrtStatus* KernelInfoGetConstantInput_tensor(const OrtKernelInfo* info, size_t index, int* constant, const OrtValue** out) const {
    return slot<OrtStatus* (*)(const OrtKernelInfo*, size_t, int*, const OrtValue**)>(249)(info, index, constant, out);
  }
  // Calls function(user, i) for i in 0..total-1 on the session's threads; batches = 0: one by one, whoever is free.
  OrtStatus* KernelContext_ParallelFor(const OrtKernelContext* context, void (*function)(void*, size_t), size_t total, size_t batches,
                                       void* user) const {
    return slot<OrtStatus* (*)(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(context, function, total,
                                                                                                               batches, user);
  }
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);  // null when this ONNX Runtime is older than `version`
  const char* (*GetVersionString)();
};

struct OrtCustomOp {
  uint32_t version;  // 16: the callbacks up to KernelComputeV2 are read
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  ONNXTensorElementDataType (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  ONNXTensorElementDataType (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  OrtCustomOpInputOutputCharacteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  OrtCustomOpInputOutputCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  OrtMemType (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  void* later[7];  // of API 17 and later: shape inference, version range, aliasing
};
static_assert(sizeof(void*) != 8 || sizeof(OrtCustomOp) == 208, "OrtCustomOp has 26 members");
