// The operators of the extension. contrastive_kernels/engine/spec.py defines what they compute, in the same words.
#pragma once

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include <ATen/core/Tensor.h>

namespace contrastive_kernels {

using OptionalTensor = std::optional<at::Tensor>;

// The sweep over all pairs of rows of x and y. x is N x D; y is M x D, or absent for x against itself.
struct Inputs {
  at::Tensor x;
  OptionalTensor y;
  at::Tensor scale;
  OptionalTensor bias, x_ids, y_ids, cutoff, term_scale, term_offset;
};

struct Description {
  std::vector<double> exponents;
  bool column_lse;
  std::string_view term;
  std::vector<double> constants;
  bool keep_equal_ids;
  // 0: no pair is dropped. 1: the pairs (i, i) are. V > 1: x holds V views of its samples, one view after the other,
  // and the pairs of one sample are dropped. kPlaces: an id is a class and a place, class * 2^32 + place; ids are equal
  // if their classes are, and the pairs of equal places are dropped.
  int64_t diagonals;
};

inline constexpr int64_t kPlaces = -1;

// An empty tensor stands for what is not wanted, here and in Gradients.
struct Statistics {
  at::Tensor row_lse, col_lse, row_sum, row_max, col_max, scores;
};

struct Upstream {
  at::Tensor grad_row_lse, grad_col_lse, grad_row_sum, row_lse, col_lse;
};

struct Wanted {
  bool x, y, scale, bias, term_scale, term_offset, total;
};

struct Gradients {
  at::Tensor x, y, scale, bias, term_scale, term_offset, total;
};

Statistics forward(const Inputs& inputs, const Description& description, bool maximum, bool save_scores);

// `scores`: those that `forward` saved, or absent. `float32_gradients`: x and y of half precision are not rounded.
Gradients backward(const Upstream& upstream, const Inputs& inputs, const Description& description, const Wanted& wanted,
                   const OptionalTensor& scores, bool float32_gradients);

// The total of a softmax and its gradients; empty where not wanted.
struct SoftmaxTotal {
  at::Tensor total, own, x, y, scale;
};

struct SoftmaxWanted {
  bool x, y, scale;
};

SoftmaxTotal softmax_total(const at::Tensor& weight, const at::Tensor& own, const Inputs& inputs,
                           const Description& description, const SoftmaxWanted& wanted);

// The values and the columns, N x k each, of the k largest (smallest) similarities of every row;
// contrastive_kernels/primitives/select.py defines the order.
std::tuple<at::Tensor, at::Tensor> row_select(const at::Tensor& x, const OptionalTensor& y, int64_t k, bool largest,
                                              const OptionalTensor& x_ids, const OptionalTensor& y_ids,
                                              bool exclude_diagonal);

// x / max(|x|, 1e-12) of every row, and the norms in the compute dtype, with a last dimension of 1.
std::tuple<at::Tensor, at::Tensor> unit_rows(const at::Tensor& x);

// The gradient of x; 0 for a row whose norm is below 1e-12.
at::Tensor unit_rows_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& norm);

// The least similar pair of each sample's views, (N, V, D) -> (N, 2).
at::Tensor view_minimum(const at::Tensor& views);

}  // namespace contrastive_kernels
