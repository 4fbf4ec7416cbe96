// The operators of this backend; what they compute is written in contrastive_kernels/sweep.py.
#pragma once

#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include <ATen/core/Tensor.h>

namespace contrastive_kernels {

using OptionalTensor = std::optional<at::Tensor>;

struct Inputs {
  at::Tensor x;
  OptionalTensor y;
  at::Tensor scale;
  OptionalTensor bias, x_ids, y_ids, cutoff, term_scale, term_offset;
};

struct Description {
  std::vector<double> exponents;
  bool columns;
  std::string_view term;
  std::vector<double> constants;
  bool same;
  // 1: not the pairs (i, i); V: x holds V views of its samples, and the pairs of one sample are dropped.
  int64_t exclude_diagonal;
};

// row_lse, col_lse, row_sum, row_max, col_max, scores.
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Gradients of x, y, scale, bias, term_scale and term_offset; the total of the term, times its gradient.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Outputs forward(const Inputs& inputs, const Description& description, bool maximum, bool keep);

Gradients backward(const at::Tensor& grad_row_lse, const at::Tensor& grad_col_lse, const at::Tensor& grad_row_sum,
                   const at::Tensor& row_lse, const at::Tensor& col_lse, const Inputs& inputs,
                   const Description& description, const std::array<bool, 7>& needs, const OptionalTensor& scores);

// Throws what is wrong with the shapes, dtypes and devices.
void check(const Inputs& inputs);

// The k largest (smallest) similarities of every row and their columns, [n, k]; see contrastive_kernels/select.py.
std::tuple<at::Tensor, at::Tensor> row_select(const at::Tensor& x, const OptionalTensor& y, int64_t k, bool largest,
                                              const OptionalTensor& x_ids, const OptionalTensor& y_ids,
                                              bool exclude_diagonal);

// x / max(|x|, 1e-12) of every row, and the norms, in the compute dtype with a last dimension of 1; and its gradient, 0
// for rows below that.
std::tuple<at::Tensor, at::Tensor> unit_rows(const at::Tensor& x);
at::Tensor unit_rows_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& norm);

// The least similar pair of each sample's views, (N, V, D) -> (N, 2).
at::Tensor view_minimum(const at::Tensor& views);

}  // namespace contrastive_kernels
