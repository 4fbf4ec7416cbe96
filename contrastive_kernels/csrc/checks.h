// What the operators demand of their arguments. Every function raises the Python exception that names the argument.
#pragma once

#include "operators.h"

namespace contrastive_kernels {

void check(const Inputs& inputs);

void check(const Inputs& inputs, const Description& description);

void check(const Inputs& inputs, const Description& description, const Wanted& wanted, const OptionalTensor& scores);

void check(const at::Tensor& weight, const at::Tensor& own, const Inputs& inputs, const Description& description);

}  // namespace contrastive_kernels
