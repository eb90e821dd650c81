// One call of an operator: its tensors, threads, memory to work in, and errors. An operator is written once against these classes; ONNX
// Runtime and TVM each derive from them what is their own.
#pragma once
#include <cstddef>
#include <initializer_list>
#include <new>

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

// Work of more than kSerial multiplications goes to the host's threads, in at most kPieces pieces of at least kPiece of them.
constexpr int64_t kSerial = 50000, kPiece = 65536, kPieces = 64;

// The first error is kept: after it, every function returns at once, with nulls or zeros.
class Failing {
 public:
  bool failed() const { return failed_; }
  __attribute__((format(printf, 2, 3))) void fail(const char* format, ...);

 protected:
  explicit Failing(const char* op) : op_(op) {}
  ~Failing() = default;
  virtual void raise(const char* message) = 0;  // gives the host its error; called once

  bool failed_ = false;

 private:
  const char* op_;
};

// The constants that an operator is made with.
class Attributes : public Failing {
 public:
  int64_t integer(const char* name);
  int64_t integer(const char* name, int64_t absent);
  float number(const char* name);
  float number(const char* name, float absent);

 protected:
  using Failing::Failing;
  // False when there is no such attribute.
  virtual bool read(const char* name, int64_t* value) = 0;
  virtual bool read(const char* name, float* value) = 0;
};

class Call : public Failing {
 public:
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
  float* output(const Shape& shape) { return output<float>(shape, 0); }
  template <typename T>
  T* output(const Shape& shape, size_t index) {
    return failed() ? nullptr : static_cast<T*>(result(index, shape));
  }

  // function(user, first, last) on ranges that make up 0 .. units - 1, units of equal cost, `multiplications` in all.
  void parallel(int64_t multiplications, int64_t units, void (*function)(const void*, int64_t, int64_t), const void* user);

  // Memory of this thread, 64-byte aligned, kept for the next call; parts of the given sizes. False, after an error, when there is none.
  bool scratch(std::initializer_list<size_t> sizes, void** parts);

 protected:
  using Failing::Failing;
  // False when the tensor is absent, or after an error.
  virtual bool tensor(size_t index, const char* name, Shape* shape, const void** data) = 0;
  virtual void* result(size_t index, const Shape& shape) = 0;
  virtual void on_threads(size_t count, void (*function)(void* user, size_t index), void* user) = 0;

 private:
  const void* data(size_t index, const char* name, bool optional, Shape* shape);
  const void* data(size_t index, const char* name, bool optional, int64_t count);
};

// The matrix in the inputs index (codes), index + 1 (scales), index + 2 (offsets, optional), `copies` of them one after the other.
Matrix matrix(Call& call, size_t index, const char* name, int64_t rows, int64_t columns, int64_t bits, int64_t block, int64_t copies);

// The lower halves in the input `index`; without rows when it is absent.
LowerHalves lower_halves(Call& call, size_t index, int64_t rows, int64_t columns, int64_t block);

inline int64_t tiles_of(int64_t rows) { return (rows + kTile - 1) / kTile; }

// Fails unless x [.., columns] has this shape.
void check_last(Call& call, const Shape& x, int64_t columns);

// Quantizes x [.., columns of w] for a product with w: `tokens` of its rows, those that `which` lists, or the first where it is null.
void quantize_tokens(Call& call, const Matrix& w, const float* input, int64_t tokens, Block* output, const int32_t* which = nullptr);

// Fails unless there are kernels for a matrix like this.
void check_format(Attributes& attributes, int64_t rows, int64_t columns, int64_t bits, int64_t block);

extern const Kernels* const active;  // the kernels in use; null when DYNCOMP_NATIVE_ISA asks for what there is not

// The attributes of an operator on one matrix.
struct MatrixOp {
  int64_t rows, columns, bits, block;
};
MatrixOp read_matrix_op(Attributes& attributes);

// What `create` of an operator returns: a copy of its attributes, or null after an error.
template <typename Op>
void* keep(Attributes& attributes, const Op& op) {
  Op* kept = attributes.failed() ? nullptr : new (std::nothrow) Op(op);
  if (kept == nullptr) attributes.fail("there is no memory left");
  return kept;
}

}  // namespace dyncomp
