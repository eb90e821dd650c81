// One call of an operator: its tensors, memory to work in, and errors that become statuses.
#pragma once
#include <initializer_list>

#include "abi.h"
#include "kernels.h"

namespace dyncomp {

constexpr size_t kMaxRank = 8;

struct Shape {
  int64_t sizes[kMaxRank];
  size_t rank = 0;

  int64_t count() const;    // elements
  int64_t leading() const;  // elements without the last dimension
  int64_t last() const { return rank ? sizes[rank - 1] : 1; }
};

// Work of more than kSerial multiplications goes to the session's threads, in at most kPieces pieces of at least kPiece of them.
constexpr int64_t kSerial = 50000, kPiece = 65536, kPieces = 64;

// The first error is kept: after it, every function returns at once, with nulls.
class Call {
 public:
  Call(const OrtApi& api, OrtKernelContext* context, const char* op);

  // A tensor's data and shape; null when it is optional and absent.
  template <typename T>
  const T* input(size_t index, const char* name, bool optional, Shape* shape) {
    return static_cast<const T*>(data(index, name, optional, shape));
  }
  // The same for a tensor that must have `count` elements.
  template <typename T>
  const T* input(size_t index, const char* name, bool optional, int64_t count) {
    return static_cast<const T*>(data(index, name, optional, count));
  }
  float* output(const Shape& shape, size_t index = 0);

  bool failed() const { return status_ != nullptr; }
  OrtStatus* status() const { return status_; }
  __attribute__((format(printf, 2, 3))) void fail(const char* format, ...);

  // function(user, first, last) on ranges that make up 0 .. units - 1, units of equal cost, `multiplications` in all.
  void parallel(int64_t multiplications, int64_t units, void (*function)(const void*, int64_t, int64_t), const void* user);

  // Memory of this thread, 64-byte aligned, kept for the next call; parts of the given sizes. Null when there is none.
  bool scratch(std::initializer_list<size_t> sizes, void** parts);

 private:
  const void* data(size_t index, const char* name, bool optional, Shape* shape);
  const void* data(size_t index, const char* name, bool optional, int64_t count);
  void keep(OrtStatus* status);

  const OrtApi& api_;
  OrtKernelContext* context_;
  const char* op_;
  size_t inputs_ = 0;
  OrtStatus* status_ = nullptr;
};

// The matrix in the inputs index (codes), index + 1 (scales), index + 2 (offsets, optional), `copies` of them one after the other.
Matrix matrix(Call& call, size_t index, const char* name, int64_t rows, int64_t columns, int64_t bits, int64_t block, int64_t copies);

inline int64_t tiles_of(int64_t rows) { return (rows + kTile - 1) / kTile; }

// Fails unless x [.., columns] has this shape.
void check_last(Call& call, const Shape& x, int64_t columns);

// Quantizes x [tokens, columns of w] for a product with w.
void quantize_tokens(Call& call, const Matrix& w, const float* input, int64_t tokens, Block* output);

// An integer attribute, which must be there. Functions that return a status return null when all is well.
OrtStatus* attribute(const OrtApi& api, const OrtKernelInfo* info, const char* name, int64_t* out);
int64_t attribute_or(const OrtApi& api, const OrtKernelInfo* info, const char* name, int64_t absent);
OrtStatus* check_format(const OrtApi& api, const char* op, int64_t rows, int64_t columns, int64_t bits, int64_t block);
OrtStatus* error(const OrtApi& api, const char* op, const char* what);

extern const Kernels* const active;  // the kernels in use; null when DYNCOMP_NATIVE_ISA asks for what there is not

// The attributes of an operator on one matrix, its kernel state.
struct MatrixOp {
  const OrtApi* api;
  int64_t rows, columns, bits, block;
};
OrtStatus* read_matrix_op(const OrtApi& api, const OrtKernelInfo* info, const char* name, MatrixOp* op);
OrtStatus* create_matrix_op(const OrtApi& api, const OrtKernelInfo* info, const char* name, void** kernel);
void destroy_matrix_op(void* kernel);

}  // namespace dyncomp
