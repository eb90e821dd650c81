// What the operators ask of a kernel: plain data and a table of functions, one table for each instruction set.
//
// Nothing here may have a function body: the header is compiled with different target flags, and the linker would keep any one of them.
#pragma once
#include <stdint.h>

namespace dyncomp {

enum {
  kTile = 16,   // rows of a tile of weights
  kGroup = 2,   // tiles that are computed together: work is handed out in multiples of it
  kBlock = 32,  // columns that share the scale of an activation
  kWide = 4,    // tiles of floats that are computed together

  kGatherRows = 4096,  // the most rows that are computed together of a matrix stored input by input, for one token
  kGatherTile = 256,   // and for several,
  kGatherTokens = 48,  // the most of them

  kMaxHeadDim = 256,   // of attention
  kKeys = 64,          // keys that are read together
  kUnitRows = 126,     // the most queries of a unit of attention, and
  kUnitFloats = 8192,  // the most floats of them
  kRowsTogether = 6,   // a number of queries that all kernels compute without remainder
};

// A quantized matrix [rows, columns], value = scale * code + offset, or scale * (code - middle). `pack.py` describes the layout.
struct Matrix {
  const uint8_t* codes;
  const uint16_t* scales;   // half floats [tiles, columns / block, 16]
  const uint16_t* offsets;  // the same; null: the middle, 8 for 4 bits and 128 for 8 bits, stands for zero
  int64_t rows, columns;
  int32_t bits, block;
};

// The lower halves of a matrix's 8-bit codes, whose upper halves are a Matrix of 4 bits: value = upper + scale * (code - 7.5). Row by row:
// columns / 2 bytes of codes, the byte i of a block of 32 holds the column i and, in its upper half, the column 16 + i; then the scales.
struct LowerHalves {
  const uint8_t* rows;
  int64_t stride, columns, block;  // stride: bytes of a row, columns / 2 + 2 * columns / block
};

// 32 activations of a token, value = scale * code.
struct Block {
  int8_t codes[kBlock];
  float scale;
  int32_t correction;  // the sum of the codes; or, for weights without offsets, what a dot product starts from: minus middle times it
};

// y[t] = W x[t] + bias
struct LinearJob {
  Matrix weight;
  const float* input;  // [tokens, columns]
  Block* blocks;       // [tokens, columns / 32]
  const float* bias;   // [rows] or null
  float* output;       // [tokens, rows]
  int64_t tokens;
  const int32_t* which;  // those that are computed, `tokens` of them; null: all
};

// For one token: y[row] += min(1, y[row] - floor) * (lower halves of the row times x), for rows that are above the floor.
struct RefineJob {
  LowerHalves lower;
  const Block* blocks;            // [columns / 32]
  const float *scales, *middles;  // theirs, and 7.5 times what they sum to: [columns / 32 rounded up to whole tiles of 16]
  float floor;
  float* output;
};

// y[t] = sum of gate * FFN_e(x[t]). A use is one token of one expert; the uses of an expert lie side by side.
struct FfnJob {
  const float* input;       // [tokens, columns]
  const float* base;        // [tokens, rows], what the result is added to; or null
  const float* bias;        // [experts, neurons or 2 * neurons] or null
  const float* down_bias;   // [rows] or null
  const int64_t* starts;    // [experts + 1]: the uses of expert e are starts[e] .. starts[e + 1] - 1
  const int32_t* tokens_of; // [uses]
  const float* gates;       // [uses]
  const int32_t* used;      // experts that have uses, used_count of them
  float* output;            // [tokens, rows]
  int64_t tokens, used_count, columns, neurons, rows;
  int64_t chunks;           // of an expert's neurons: 32, or 64 in floats where there is no gate
  int64_t up_tiles, down_tiles;  // of one expert
  int32_t gated, activation;
  bool add;  // the result is added to what the output holds, in place of base and bias
};

struct QuantizedFfnJob : FfnJob {
  Matrix up, down;  // of the first expert; expert e begins e times so many tiles later
  Block* blocks;    // [tokens, columns / 32]
  Block* hidden;    // [uses, neurons / 32]
};

// Weights as tiles of 16 rows, [columns, 16] each. The gate's rows and the rows they multiply begin with a tile each.
struct FloatFfnJob : FfnJob {
  const float *up, *down;  // [experts, up_tiles, columns, 16], [experts, down_tiles, neurons, 16]
  float* hidden;           // [uses, neurons rounded up to whole chunks]
};

// Causal attention over a KV cache; see ops.py in dyncomp. Query s of a row stands at position past[row] + s. The entries of the tokens that
// are present lie side by side.
struct AttentionJob {
  const float *query, *key, *value;  // a token's heads lie side by side, tokens query_stride or key_stride floats apart
  int64_t query_stride, key_stride;
  char *key_cache, *value_cache;     // [batch, kv_heads, capacity, entry]
  int64_t entry;                     // bytes of a key or value: head_dim floats; or, when coded, head_dim int8 codes and then their scale
  bool coded;
  const int64_t* past;               // [batch]
  const int32_t* before;             // [batch, capacity + 1], tokens that are present before each position; null: all are
  const int32_t* position;           // [batch, capacity], of each entry; null: the same as the entry, or not needed
  const float* gates;                // [batch, length], 0 for queries that nothing reads, which give zeros; or null
  const float *cos, *sin;            // [positions, half]; the first 2 * half features are rotated
  const float* bias;                 // [heads, reach + kKeys]: entry i is added to the score of a key reach - 1 - i positions back; or null
  int64_t reach;
  float* output;                     // [batch, length, heads, head_dim]
  int64_t batch, length, heads, kv_heads, head_dim, capacity, half, window;
  int32_t interleaved;
  float scale, softcap;

  // Entries of the tokens before a position, and so the entry of the token there if it is present.
  int64_t entries(int64_t row, int64_t at) const { return before ? before[row * (capacity + 1) + at] : at; }
  bool is_present(int64_t row, int64_t at) const { return entries(row, at + 1) > entries(row, at); }
  // The first entry that a query at a position sees.
  int64_t first_seen(int64_t row, int64_t at) const { return window && at >= window ? entries(row, at - window + 1) : 0; }
};

// The queries from .. to - 1 (of length * heads / kv_heads, a token's side by side) of a row and key head over the entries begin .. end - 1.
struct AttentionUnit {
  int64_t row, head, from, to, begin, end;
  float* partial;  // [to - from, head_dim + 16] for weighted values, largest score and sum of weights; null: the output is written
};

// A quantized matrix [rows, columns] stored input by input; values as in Matrix, the layout as `pack_inputs` in pack.py describes it.
struct InputMatrix {
  const uint8_t* codes;     // [columns, stride]
  const uint16_t* scales;   // half floats [columns / block, padded]
  const uint16_t* offsets;  // the same, or null
  int64_t rows, columns, stride, padded;
  int32_t bits, block;
};

// y[t] = W x[t] + bias
struct GatherJob {
  InputMatrix weight;
  Block* blocks;      // [tokens, columns / 32]
  const float* bias;  // [rows] or null
  float* output;      // [tokens, rows]
  int64_t tokens;
};

struct Kernels {
  const char* name;
  // Quantizes `count` blocks of 32 floats for a product with the matrix. A block with an infinity or a NaN becomes NaN.
  void (*quantize)(const Matrix& matrix, const float* input, int64_t count, Block* output);
  // Rows of the tiles first .. last - 1 for the tokens from .. to - 1, of those that are computed.
  void (*linear)(const LinearJob& job, int64_t first, int64_t last, int64_t from, int64_t to);
  // The largest of `count` numbers; NaNs count as nothing, or as the largest.
  float (*peak)(const float* x, int64_t count);
  // The rows first .. last - 1.
  void (*refine)(const RefineJob& job, int64_t first, int64_t last);
  // The hidden activations of the chunks first .. last - 1 of used_count * chunks, for all uses, with the gate, quantized.
  void (*expand)(const QuantizedFfnJob& job, int64_t first, int64_t last);
  // Outputs of the tiles first .. last - 1 for all tokens, summed over the experts.
  void (*contract)(const QuantizedFfnJob& job, int64_t first, int64_t last);
  // The same in floats.
  void (*expand_floats)(const FloatFfnJob& job, int64_t first, int64_t last);
  void (*contract_floats)(const FloatFfnJob& job, int64_t first, int64_t last);
  // scores [tokens, experts] = x [tokens, columns] times router [experts, columns] plus bias [experts].
  void (*route)(const float* x, const float* router, const float* bias, int64_t experts, int64_t columns, int64_t tokens, float* scores);
  // One row of a matrix as floats [columns].
  void (*decode)(const Matrix& matrix, int64_t row, float* output);
  // Adds the lower halves of one row to the floats of the upper ones.
  void (*decode_lower)(const LowerHalves& lower, int64_t row, float* output);
  // Writes the keys, rotated, and values of the tokens first .. last - 1 (of batch * length) into the caches.
  void (*append)(const AttentionJob& job, int64_t first, int64_t last);
  void (*attend)(const AttentionJob& job, const AttentionUnit& unit);
  // For the job's only token: the products of the rows first .. last - 1 (at most kGatherRows) with the inputs of the blocks from .. to - 1,
  // without the bias. Weights of inputs whose code is 0 are not read.
  void (*gather_one)(const GatherJob& job, int64_t first, int64_t last, int64_t from, int64_t to, float* output);
  // The rows first .. last - 1 (at most kGatherTile) for the tokens from .. to - 1 (at most kGatherTokens). `first` is a multiple of 128.
  void (*gather_many)(const GatherJob& job, int64_t first, int64_t last, int64_t from, int64_t to);
  // output = activation of the first half of x [2 neurons] times the second half; x is overwritten.
  void (*gate)(int32_t activation, float* x, int64_t neurons, float* output);
  // Copies x, with zeros where its magnitude is at most the threshold.
  void (*keep_large)(const float* x, const float* thresholds, int64_t columns, float* output);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// The table in use; null, with the reason in `*reason`, when DYNCOMP_NATIVE_ISA asks for what there is not.
const Kernels* kernels(const char** reason);

}  // namespace dyncomp
