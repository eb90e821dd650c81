// The operators for TVM: packed functions f(attributes, inputs..., output) that TVM finds in the library by name. Attributes are a text,
// " rows=576 columns=1536 …"; inputs that are absent are None, or at the end left out; the output has been allocated, further ones are inputs that change.
#include <tvm/ffi/c_api.h>
#include <tvm/runtime/c_backend_api.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "operators.h"

namespace dyncomp {
namespace {

void set_error(const char* message) { TVMFFIErrorSetRaisedFromCStr("ValueError", message); }

DLDataType dtype_of(Type type) {
  switch (type) {
    case Type::kFloat: return {kDLFloat, 32, 1};
    case Type::kByte: return {kDLUInt, 8, 1};
    case Type::kInt64: return {kDLInt, 64, 1};
    case Type::kHalf: return {kDLFloat, 16, 1};
  }
  __builtin_unreachable();
}

class TvmAttributes final : public Attributes {
 public:
  TvmAttributes(const char* op, const std::string& text) : Attributes(op), text_(text) {}

 private:
  void raise(const char* message) override { set_error(message); }
  bool read(const char* name, int64_t* value) override {
    const char* at = find(name);
    if (at != nullptr) *value = std::strtoll(at, nullptr, 10);
    return at != nullptr;
  }
  bool read(const char* name, float* value) override {
    const char* at = find(name);
    if (at != nullptr) *value = std::strtof(at, nullptr);
    return at != nullptr;
  }
  const char* find(const char* name) const {
    const std::string key = std::string(" ") + name + "=";
    const size_t at = text_.find(key);
    return at == std::string::npos ? nullptr : text_.c_str() + at + key.size();
  }

  const std::string& text_;
};

class TvmCall final : public Call {
 public:
  TvmCall(const Operator& operation, const TVMFFIAny* inputs, size_t count, const TVMFFIAny& output)
      : Call(operation.name), operation_(operation), inputs_(inputs), count_(count), output_(output) {}

 private:
  void raise(const char* message) override { set_error(message); }

  bool tensor(size_t index, const char* name, Shape* shape, const void** data) override {
    if (index >= count_ || inputs_[index].type_index == kTVMFFINone) return false;
    *data = read(inputs_[index], name, operation_.inputs[index].type, shape);
    return !failed();
  }

  void* result(size_t index, const Shape& shape) override {
    Shape given;
    if (index > 0) {  // an input that is updated in place
      const TVMFFIAny& updated = inputs_[operation_.updated + index - 1];
      return operation_.updated ? read(updated, "output", operation_.later, &given) : nullptr;
    }
    void* data = read(output_, "output", Type::kFloat, &given);
    bool equal = given.rank == shape.rank;
    for (size_t i = 0; equal && i < shape.rank; i++) equal = given.sizes[i] == shape.sizes[i];
    if (!equal) fail("the output has %lld elements in %zu dimensions; it should have %lld in %zu", static_cast<long long>(given.count()),
                     given.rank, static_cast<long long>(shape.count()), shape.rank);
    return failed() ? nullptr : data;
  }

  // The data and shape of a tensor of this type; an error when the value is anything else.
  void* read(const TVMFFIAny& value, const char* name, Type type, Shape* shape) {
    const bool whole = value.type_index == kTVMFFITensor;
    if (!whole && value.type_index != kTVMFFIDLTensorPtr) return fail("the argument %s is no tensor", name), nullptr;
    const DLTensor& t = whole ? *TVMFFITensorGetDLTensorPtr(value.v_obj) : *static_cast<DLTensor*>(value.v_ptr);
    const DLDataType wanted = dtype_of(type);
    if (t.device.device_type != kDLCPU || t.dtype.code != wanted.code || t.dtype.bits != wanted.bits || t.dtype.lanes != 1) {
      fail("the argument %s has another type, or is not in the CPU's memory", name);
    } else if (t.ndim > static_cast<int>(kMaxRank)) {
      fail("the argument %s has %d dimensions; %zu are allowed", name, t.ndim, kMaxRank);
    }
    if (failed()) return nullptr;
    shape->rank = t.ndim;
    std::copy(t.shape, t.shape + t.ndim, shape->sizes);
    int64_t step = 1;
    for (int i = t.ndim - 1; i >= 0 && t.strides && shape->count(); step *= t.shape[i--]) {
      if (t.shape[i] > 1 && t.strides[i] != step) fail("the argument %s is not contiguous", name);
    }
    return static_cast<char*>(t.data) + t.byte_offset;
  }

  // Each of TVM's threads takes the next piece until none is left.
  void on_threads(size_t count, void (*function)(void*, size_t), void* user) override {
    struct Pieces {
      void (*function)(void*, size_t);
      void* user;
      size_t count;
      std::atomic<size_t> next;
    } pieces = {function, user, count, {0}};
    const auto run = [](int, TVMParallelGroupEnv*, void* data) {
      Pieces& p = *static_cast<Pieces*>(data);
      for (size_t i; (i = p.next.fetch_add(1, std::memory_order_relaxed)) < p.count;) p.function(p.user, i);
      return 0;
    };
    if (TVMBackendParallelLaunch(run, &pieces, 0) != 0) failed_ = true;  // TVM has set its error
  }

  const Operator& operation_;
  const TVMFFIAny* inputs_;
  size_t count_;
  const TVMFFIAny& output_;
};

// The operator with these attributes, made when it is first called and kept: a model has few different ones.
const void* kernel_for(const Operator& operation, const std::string& text) {
  static std::mutex mutex;
  static std::map<std::pair<const Operator*, std::string>, void*> made;
  const std::lock_guard<std::mutex> lock(mutex);
  void*& kernel = made[{&operation, text}];
  if (kernel == nullptr) {
    TvmAttributes attributes(operation.name, text);
    kernel = operation.create(attributes);
  }
  return kernel;
}

int run(const Operator& operation, const TVMFFIAny* arguments, int32_t count) {
  const char* reason = nullptr;
  if (kernels(&reason) == nullptr) return set_error(reason), -1;
  if (count < 2 || count > static_cast<int32_t>(operation.count) + 2 || arguments[0].type_index != kTVMFFIStr) {
    return set_error("an operator of dyncomp is called with a text, its inputs and its output"), -1;
  }
  const TVMFFIByteArray& text = *TVMFFIBytesGetByteArrayPtr(arguments[0].v_obj);
  const void* kernel = kernel_for(operation, std::string(text.data, text.size));
  if (kernel == nullptr) return -1;
  TvmCall call(operation, arguments + 1, static_cast<size_t>(count - 2), arguments[count - 1]);
  operation.compute(kernel, call);
  return call.failed() ? -1 : 0;
}

}  // namespace
}  // namespace dyncomp

#define DYNCOMP_EXPORT(name)                                                                                                             \
  extern "C" __attribute__((visibility("default"))) int __tvm_ffi_dyncomp_##name(void*, const TVMFFIAny* arguments, int32_t count,      \
                                                                                  TVMFFIAny*) {                                         \
    return dyncomp::run(dyncomp::name, arguments, count);                                                                               \
  }
DYNCOMP_EXPORT(quantized_linear)
DYNCOMP_EXPORT(quantized_ffn)
DYNCOMP_EXPORT(quantized_embedding)
DYNCOMP_EXPORT(sparse_linear)
DYNCOMP_EXPORT(cached_attention)
DYNCOMP_EXPORT(quantized_cached_attention)
