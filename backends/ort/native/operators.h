// The operators as library.cc registers them.
#pragma once
#include "context.h"

namespace dyncomp {

struct Input {
  ONNXTensorElementDataType type;
  bool optional;
};

struct Operator {
  const char* name;
  const Input* inputs;
  size_t count;
  OrtStatus* (*create)(const OrtApi& api, const OrtKernelInfo* info, void** kernel);
  OrtStatus* (*compute)(void* kernel, OrtKernelContext* context);
  void (*destroy)(void* kernel);
  size_t outputs = 1;
};

extern const Operator quantized_linear, sparse_linear, quantized_ffn, float_ffn, quantized_embedding, cached_attention;

}  // namespace dyncomp
