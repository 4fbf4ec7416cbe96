#include "checks.h"

namespace contrastive_kernels {
namespace {

at::ScalarType compute_dtype(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

void check_tensor(const OptionalTensor& tensor, const char* name, at::ScalarType dtype, at::IntArrayRef shape) {
  if (!tensor) return;
  TORCH_CHECK_TYPE(tensor->scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor->scalar_type());
  TORCH_CHECK_VALUE(tensor->sizes() == shape, name, " ", tensor->sizes(), " must have shape ", shape);
  TORCH_CHECK(tensor->is_cpu(), name, " is on ", tensor->device(), ", x on the CPU");
}

}  // namespace

void check(const Inputs& in) {
  const auto& x = in.x;
  const auto& y = in.y ? *in.y : x;
  TORCH_CHECK_VALUE(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1), "x ", x.sizes(), " and y ", y.sizes(),
                    " must be matrices with the same last dimension");
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
                   "x must be float32, float64, float16 or bfloat16, got ", dtype);
  TORCH_CHECK_TYPE(y.scalar_type() == dtype, "y must have the dtype of x, ", dtype, ", got ", y.scalar_type());
  TORCH_CHECK(y.is_cpu(), "y is on ", y.device(), ", x on the CPU");

  const auto compute = compute_dtype(x);
  const int64_t n = x.size(0), m = y.size(0);
  if (in.scale.defined()) check_tensor(in.scale, "scale", compute, {});
  check_tensor(in.bias, "bias", compute, {m});
  check_tensor(in.x_ids, "x_ids", at::kLong, {n});
  check_tensor(in.y_ids, "y_ids", at::kLong, {m});
  check_tensor(in.cutoff, "cutoff", compute, {n});
  check_tensor(in.term_scale, "term_scale", compute, {});
  check_tensor(in.term_offset, "term_offset", compute, {n});
  TORCH_CHECK_VALUE(!in.y || in.x_ids.has_value() == in.y_ids.has_value(), "x_ids and y_ids must be given together");
}

void check(const Inputs& in, const Description& description) {
  check(in);
  TORCH_CHECK_VALUE(!description.column_lse || (!in.bias && description.exponents.size() <= 1),
                    "column_lse cannot be combined with bias or several exponents");
  const int64_t diagonals = description.diagonals;
  if (diagonals == kPlaces) {
    TORCH_CHECK_VALUE(in.x_ids, "diagonals ", diagonals, " reads places in the ids, and there are none");
    return;
  }
  TORCH_CHECK_VALUE(0 <= diagonals && (diagonals <= 1 || (!in.y && in.x.size(0) % diagonals == 0)), "diagonals ",
                    diagonals, " must be 0, 1 or the number of views in x, which has no y then");
}

void check(const Inputs& in, const Description& description, const Wanted& wanted, const OptionalTensor& scores) {
  check(in, description);
  TORCH_CHECK_VALUE(
      !wanted.total || (description.exponents.empty() && !description.column_lse && !description.term.empty()),
      "the total is that of a term without log-sum-exps beside it");
  check_tensor(scores, "scores", compute_dtype(in.x), {in.x.size(0), (in.y ? *in.y : in.x).size(0)});
  TORCH_CHECK_VALUE(!scores || scores->is_contiguous(), "scores must be contiguous");
}

void check(const at::Tensor& weight, const at::Tensor& own, const Inputs& in, const Description& description) {
  check(in, description);
  check_tensor(weight, "weight", compute_dtype(in.x), {in.x.size(0)});
  check_tensor(own, "own", compute_dtype(in.x), {in.x.size(0)});
  TORCH_CHECK_VALUE(
      description.exponents == std::vector{1.0} && !description.column_lse && description.term.empty() && !in.bias,
      "the total of a softmax is that of one log-sum-exp of the rows, without a bias");
}

}  // namespace contrastive_kernels
