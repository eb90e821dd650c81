#include "call.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace dyncomp {
namespace {

struct Memory {
  void* begin = nullptr;
  size_t size = 0;
  ~Memory() { std::free(begin); }
};

}  // namespace

int64_t Shape::leading() const {
  int64_t n = 1;
  for (size_t i = 0; i + 1 < rank; i++) n *= sizes[i];
  return n;
}
int64_t Shape::count() const { return leading() * last(); }

void Failing::fail(const char* format, ...) {
  if (failed_) return;
  failed_ = true;
  char text[320];
  const int start = std::snprintf(text, sizeof text, "dyncomp.%s: ", op_);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text + start, sizeof text - start, format, arguments);
  va_end(arguments);
  raise(text);
}

int64_t Attributes::integer(const char* name) {
  int64_t value = 0;
  if (!failed() && !read(name, &value)) fail("the attribute %s is missing", name);
  return value;
}

int64_t Attributes::integer(const char* name, int64_t absent) {
  int64_t value = absent;
  return failed() || !read(name, &value) ? absent : value;
}

float Attributes::number(const char* name) {
  float value = 0.0f;
  if (!failed() && !read(name, &value)) fail("the attribute %s is missing", name);
  return value;
}

float Attributes::number(const char* name, float absent) {
  float value = absent;
  return failed() || !read(name, &value) ? absent : value;
}

const void* Call::data(size_t index, const char* name, bool optional, Shape* shape) {
  const void* pointer = nullptr;
  if (failed() || tensor(index, name, shape, &pointer)) return pointer;
  if (!optional) fail("the input %s is missing", name);
  return nullptr;
}

const void* Call::data(size_t index, const char* name, bool optional, int64_t count) {
  Shape shape;
  const void* pointer = data(index, name, optional, &shape);
  if (pointer && shape.count() != count) {
    fail("the input %s has %lld elements; it should have %lld", name, static_cast<long long>(shape.count()), static_cast<long long>(count));
    return nullptr;
  }
  return pointer;
}

void Call::parallel(int64_t multiplications, int64_t units, void (*function)(const void*, int64_t, int64_t), const void* user) {
  struct Pieces {
    void (*function)(const void*, int64_t, int64_t);
    const void* user;
    int64_t units, together;
  };
  if (failed()) return;
  const int64_t wanted = std::min(kPieces, multiplications / kPiece);
  if (multiplications <= kSerial || wanted < 2 || units < 2) return function(user, 0, units);
  Pieces pieces = {function, user, units, std::max<int64_t>(1, units / wanted)};
  const int64_t count = (units + pieces.together - 1) / pieces.together;
  const auto run = [](void* data, size_t index) {
    const Pieces& p = *static_cast<const Pieces*>(data);
    const int64_t first = static_cast<int64_t>(index) * p.together;
    p.function(p.user, first, std::min(first + p.together, p.units));
  };
  on_threads(static_cast<size_t>(count), run, &pieces);
}

bool Call::scratch(std::initializer_list<size_t> sizes, void** parts) {
  static thread_local Memory memory;
  if (failed()) return false;
  size_t need = 64;
  for (size_t size : sizes) need += (size + 63) / 64 * 64;
  if (need > memory.size) {
    std::free(memory.begin);
    memory.begin = std::aligned_alloc(64, (need + need / 4 + 63) / 64 * 64);
    memory.size = memory.begin ? need + need / 4 : 0;
    if (!memory.begin) fail("there is no memory for %zu bytes of intermediate values", need);
  }
  char* at = static_cast<char*>(memory.begin);
  for (size_t size : sizes) {
    *parts++ = at;
    if (at) at += (size + 63) / 64 * 64;
  }
  return !failed();
}

Matrix matrix(Call& call, size_t index, const char* name, int64_t rows, int64_t columns, int64_t bits, int64_t block, int64_t copies) {
  char part[64];
  const int64_t elements = copies * tiles_of(rows) * kTile * columns, groups = elements / block;
  Matrix m = {};
  m.rows = rows, m.columns = columns;
  m.bits = static_cast<int32_t>(bits), m.block = static_cast<int32_t>(block);
  std::snprintf(part, sizeof part, "%scodes", name);
  m.codes = call.input<uint8_t>(index, part, false, elements * bits / 8);
  std::snprintf(part, sizeof part, "%sscales", name);
  m.scales = call.input<uint16_t>(index + 1, part, false, groups);
  std::snprintf(part, sizeof part, "%soffsets", name);
  m.offsets = call.input<uint16_t>(index + 2, part, true, groups);
  return m;
}

LowerHalves lower_halves(Call& call, size_t index, int64_t rows, int64_t columns, int64_t block) {
  LowerHalves m = {};
  m.stride = columns / 2 + 2 * (columns / block), m.columns = columns, m.block = block;
  m.rows = call.input<uint8_t>(index, "lower", true, rows * m.stride);
  return m;
}

void check_last(Call& call, const Shape& x, int64_t columns) {
  if (call.failed() || (x.rank > 0 && x.last() == columns)) return;
  call.fail("the last dimension of x is %lld; it should be %lld", static_cast<long long>(x.last()), static_cast<long long>(columns));
}

void quantize_tokens(Call& call, const Matrix& w, const float* input, int64_t tokens, Block* output, const int32_t* which) {
  struct Job {
    const Matrix& w;
    const float* input;
    Block* output;
    const int32_t* which;
  };
  const Job job = {w, input, output, which};
  const auto all = [](const void* data, int64_t first, int64_t last) {
    const Job& j = *static_cast<const Job*>(data);
    active->quantize(j.w, j.input + first * kBlock, last - first, j.output + first);
  };
  const auto some = [](const void* data, int64_t first, int64_t last) {
    const Job& j = *static_cast<const Job*>(data);
    const int64_t blocks = j.w.columns / kBlock;
    for (int64_t i = first; i < last; i++) {
      active->quantize(j.w, j.input + j.which[i] * j.w.columns, blocks, j.output + j.which[i] * blocks);
    }
  };
  const int64_t work = tokens * w.columns * 4;  // a number costs about as much as four multiplications
  which ? call.parallel(work, tokens, some, &job) : call.parallel(work, tokens * (w.columns / kBlock), all, &job);
}

void check_format(Attributes& attributes, int64_t rows, int64_t columns, int64_t bits, int64_t block) {
  const auto show = [](int64_t x) { return static_cast<long long>(x); };
  if (bits != 4 && bits != 8) {
    attributes.fail("bits is %lld; it should be 4 or 8", show(bits));
  } else if (block != 32 && block != 64 && block != 128) {
    attributes.fail("block is %lld; it should be 32, 64 or 128", show(block));
  } else if (rows < 1 || rows > INT32_MAX || columns < 1 || columns > INT32_MAX) {
    attributes.fail("a matrix of %lld rows and %lld columns", show(rows), show(columns));
  } else if (columns % block) {
    attributes.fail("%lld columns are no multiple of the block, %lld", show(columns), show(block));
  }
}

MatrixOp read_matrix_op(Attributes& attributes) {
  const MatrixOp op = {attributes.integer("rows"), attributes.integer("columns"), attributes.integer("bits"), attributes.integer("block")};
  check_format(attributes, op.rows, op.columns, op.bits, op.block);
  return op;
}

namespace {
const Kernels* find() {
  const char* reason;
  return kernels(&reason);
}
}  // namespace
const Kernels* const active = find();

}  // namespace dyncomp
