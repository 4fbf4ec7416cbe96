// The only file that knows the dispatcher and Python. The schemas are those of contrastive_kernels/sweep.py.
#include <Python.h>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <torch/library.h>

#include "sweep.h"

#define INPUTS                                                                                              \
  "Tensor x, Tensor? y, Tensor scale, Tensor? bias, Tensor? x_ids, Tensor? y_ids, Tensor? cutoff, "         \
  "Tensor? term_scale, Tensor? term_offset, float[] exponents, bool columns, str term, float[] constants, " \
  "bool same, int exclude_diagonal, "

namespace contrastive_kernels {
namespace {

using Numbers = at::ArrayRef<double>;

Outputs cpp_forward(const at::Tensor& x, const OptionalTensor& y, const at::Tensor& scale, const OptionalTensor& bias,
                    const OptionalTensor& x_ids, const OptionalTensor& y_ids, const OptionalTensor& cutoff,
                    const OptionalTensor& term_scale, const OptionalTensor& term_offset, Numbers exponents,
                    bool columns, std::string_view term, Numbers constants, bool same, int64_t exclude_diagonal,
                    bool maximum, bool keep) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return forward({x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset},
                 {exponents.vec(), columns, term, constants.vec(), same, exclude_diagonal}, maximum, keep);
}

Gradients cpp_backward(const at::Tensor& grad_row_lse, const at::Tensor& grad_col_lse, const at::Tensor& grad_row_sum,
                       const at::Tensor& row_lse, const at::Tensor& col_lse, const at::Tensor& x,
                       const OptionalTensor& y, const at::Tensor& scale, const OptionalTensor& bias,
                       const OptionalTensor& x_ids, const OptionalTensor& y_ids, const OptionalTensor& cutoff,
                       const OptionalTensor& term_scale, const OptionalTensor& term_offset, Numbers exponents,
                       bool columns, std::string_view term, Numbers constants, bool same, int64_t exclude_diagonal,
                       c10::List<bool> needs, const OptionalTensor& scores) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  std::array<bool, 7> wanted;
  TORCH_CHECK(needs.size() == wanted.size(), "needs must have 7 entries, got ", needs.size());
  std::copy(needs.begin(), needs.end(), wanted.begin());
  return backward(grad_row_lse, grad_col_lse, grad_row_sum, row_lse, col_lse,
                  {x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset},
                  {exponents.vec(), columns, term, constants.vec(), same, exclude_diagonal}, wanted, scores);
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
  m.def("cpp_forward(" INPUTS "bool maximum, bool keep=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpp_backward(Tensor grad_row_lse, Tensor grad_col_lse, Tensor grad_row_sum, Tensor row_lse, Tensor "
      "col_lse, " INPUTS
      "bool[] needs, Tensor? scores=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
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
  m.impl("cpp_select", TORCH_FN(contrastive_kernels::cpp_select));
  m.impl("cpp_unit_rows", TORCH_FN(contrastive_kernels::cpp_unit_rows));
  m.impl("cpp_unit_rows_backward", TORCH_FN(contrastive_kernels::cpp_unit_rows_backward));
  m.impl("cpp_views", TORCH_FN(contrastive_kernels::cpp_views));
}

// Importing the module registers the operators; there is nothing else in it.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module{PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
