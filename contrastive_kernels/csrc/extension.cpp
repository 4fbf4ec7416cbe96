// The operators as PyTorch's dispatcher and Python see them; no other file includes either. The schemas are equal to
// those of contrastive_kernels/engine/spec.py.
#include <pybind11/pybind11.h>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <torch/library.h>

#include "build_info.h"
#include "operators.h"

#define INPUTS                                                                                                 \
  "Tensor x, Tensor? y, Tensor scale, Tensor? bias, Tensor? x_ids, Tensor? y_ids, Tensor? cutoff, "            \
  "Tensor? term_scale, Tensor? term_offset, float[] exponents, bool column_lse, str term, float[] constants, " \
  "bool keep_equal_ids, int diagonals, "

namespace contrastive_kernels {
namespace {

using Numbers = at::ArrayRef<double>;

auto cpp_forward(const at::Tensor& x, const OptionalTensor& y, const at::Tensor& scale, const OptionalTensor& bias,
                 const OptionalTensor& x_ids, const OptionalTensor& y_ids, const OptionalTensor& cutoff,
                 const OptionalTensor& term_scale, const OptionalTensor& term_offset, Numbers exponents,
                 bool column_lse, std::string_view term, Numbers constants, bool keep_equal_ids, int64_t diagonals,
                 bool maximum, bool save_scores) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto s =
      forward({x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset},
              {exponents.vec(), column_lse, term, constants.vec(), keep_equal_ids, diagonals}, maximum, save_scores);
  return std::make_tuple(s.row_lse, s.col_lse, s.row_sum, s.row_max, s.col_max, s.scores);
}

auto cpp_backward(const at::Tensor& grad_row_lse, const at::Tensor& grad_col_lse, const at::Tensor& grad_row_sum,
                  const at::Tensor& row_lse, const at::Tensor& col_lse, const at::Tensor& x, const OptionalTensor& y,
                  const at::Tensor& scale, const OptionalTensor& bias, const OptionalTensor& x_ids,
                  const OptionalTensor& y_ids, const OptionalTensor& cutoff, const OptionalTensor& term_scale,
                  const OptionalTensor& term_offset, Numbers exponents, bool column_lse, std::string_view term,
                  Numbers constants, bool keep_equal_ids, int64_t diagonals, const c10::List<bool>& wanted,
                  const OptionalTensor& scores, bool float32_gradients) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK_VALUE(wanted.size() == 7, "wanted must have 7 entries, got ", wanted.size());
  const auto g = backward({grad_row_lse, grad_col_lse, grad_row_sum, row_lse, col_lse},
                          {x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset},
                          {exponents.vec(), column_lse, term, constants.vec(), keep_equal_ids, diagonals},
                          {wanted[0], wanted[1], wanted[2], wanted[3], wanted[4], wanted[5], wanted[6]}, scores,
                          float32_gradients);
  return std::make_tuple(g.x, g.y, g.scale, g.bias, g.term_scale, g.term_offset, g.total);
}

auto cpp_softmax_total(const at::Tensor& weight, const at::Tensor& own, const at::Tensor& x, const OptionalTensor& y,
                       const at::Tensor& scale, const OptionalTensor& bias, const OptionalTensor& x_ids,
                       const OptionalTensor& y_ids, const OptionalTensor& cutoff, const OptionalTensor& term_scale,
                       const OptionalTensor& term_offset, Numbers exponents, bool column_lse, std::string_view term,
                       Numbers constants, bool keep_equal_ids, int64_t diagonals, const c10::List<bool>& wanted) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK_VALUE(wanted.size() == 3, "wanted must have 3 entries, got ", wanted.size());
  const auto t = softmax_total(weight, own, {x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset},
                               {exponents.vec(), column_lse, term, constants.vec(), keep_equal_ids, diagonals},
                               {wanted[0], wanted[1], wanted[2]});
  return std::make_tuple(t.x, t.y, t.scale, t.own, t.total);
}

std::tuple<at::Tensor, at::Tensor> cpp_select(const at::Tensor& x, const OptionalTensor& y, int64_t k, bool largest,
                                              const OptionalTensor& x_ids, const OptionalTensor& y_ids,
                                              bool exclude_diagonal) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return row_select(x, y, k, largest, x_ids, y_ids, exclude_diagonal);
}

std::tuple<at::Tensor, at::Tensor> cpp_unit_rows(const at::Tensor& x) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return unit_rows(x);
}

at::Tensor cpp_unit_rows_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& norm) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return unit_rows_backward(grad, x, norm);
}

at::Tensor cpp_views(const at::Tensor& views) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return view_minimum(views);
}

}  // namespace
}  // namespace contrastive_kernels

TORCH_LIBRARY_FRAGMENT(contrastive_kernels, m) {
  m.def("cpp_forward(" INPUTS
        "bool maximum, bool save_scores=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpp_backward(Tensor grad_row_lse, Tensor grad_col_lse, Tensor grad_row_sum, Tensor row_lse, "
      "Tensor col_lse, " INPUTS
      "bool[] wanted, Tensor? scores=None, bool float32_gradients=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def("cpp_softmax_total(Tensor weight, Tensor own, " INPUTS
        "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpp_select(Tensor x, Tensor? y, int k, bool largest, Tensor? x_ids, Tensor? y_ids, bool exclude_diagonal) "
      "-> (Tensor, Tensor)");
  m.def("cpp_unit_rows(Tensor x) -> (Tensor, Tensor)");
  m.def("cpp_unit_rows_backward(Tensor grad, Tensor x, Tensor norm) -> Tensor");
  m.def("cpp_views(Tensor views) -> Tensor");
}

TORCH_LIBRARY_IMPL(contrastive_kernels, CPU, m) {
  m.impl("cpp_forward", TORCH_FN(contrastive_kernels::cpp_forward));
  m.impl("cpp_backward", TORCH_FN(contrastive_kernels::cpp_backward));
  m.impl("cpp_softmax_total", TORCH_FN(contrastive_kernels::cpp_softmax_total));
  m.impl("cpp_select", TORCH_FN(contrastive_kernels::cpp_select));
  m.impl("cpp_unit_rows", TORCH_FN(contrastive_kernels::cpp_unit_rows));
  m.impl("cpp_unit_rows_backward", TORCH_FN(contrastive_kernels::cpp_unit_rows_backward));
  m.impl("cpp_views", TORCH_FN(contrastive_kernels::cpp_views));
}

// Importing the module registers the operators above.
PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    const auto info = contrastive_kernels::build_info();
    pybind11::dict result;
    result["torch"] = info.torch;
    result["standard"] = "C++" + std::to_string(info.standard / 100 % 100);
    result["compiler"] = info.compiler;
    result["instruction_set"] = info.instruction_set;
    result["bfloat16_matrix_unit"] = info.bfloat16_matrix_unit;
    result["threads"] = info.threads;
    return result;
  });
}
