// The operators, as the libraries for ONNX Runtime and TVM offer them.
#pragma once
#include "call.h"

namespace dyncomp {

enum class Type { kFloat, kByte, kInt64, kHalf };

struct Input {
  Type type;
  bool optional;
};

struct Operator {
  const char* name;
  const Input* inputs;
  size_t count;
  void* (*create)(Attributes& attributes);  // null after an error
  void (*compute)(const void* kernel, Call& call);
  void (*destroy)(void* kernel);
  size_t outputs = 1;
  Type later = Type::kFloat;  // of the outputs after the first
  size_t updated = 0;         // the input that the second output may share memory with, the next the third: 0 for none
  size_t optional = 0;        // how many of the last outputs may be left out: then there is no memory for them
};

extern const Operator quantized_linear, sparse_linear, quantized_ffn, float_ffn, quantized_embedding, token_gates, norm_gates,
    cached_attention, quantized_cached_attention;

}  // namespace dyncomp
