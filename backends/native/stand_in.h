// What stands in for a layer that a token skips: a low-rank linear map, added to what the layer gives.
#pragma once
#include "operators.h"

namespace dyncomp {

// The inputs of an operator that belong to it: x, up_codes, up_scales, up_offsets, up_bias, down_codes, down_scales, down_offsets.
#define STAND_IN_INPUTS \
  {Type::kFloat, true}, {Type::kByte, true}, {Type::kHalf, true}, {Type::kHalf, true}, {Type::kFloat, true}, {Type::kByte, true}, \
      {Type::kHalf, true}, { Type::kHalf, true }
constexpr size_t kStandInInputs = 8;

struct StandIn {
  int64_t columns, neurons, rows, bits, block;  // neurons 0: there is none
};

// Reads the attributes standin_columns, standin_neurons (0 when absent), standin_bits and standin_block.
StandIn read_stand_in(Attributes& attributes, int64_t rows);

// output[t] += down (up x[t] + up_bias) for the tokens whose gate is 0; `index` is that of x among the inputs. Fails when there are no gates.
void add_stand_in(Call& call, const StandIn& op, size_t index, const float* gates, int64_t tokens, float* output);

// Both products of a job whose tokens are quantized, for so many pairs of a token and an expert.
void run_experts(Call& call, const QuantizedFfnJob& job, int64_t pairs);

}  // namespace dyncomp
