#include "operators.h"

#include <algorithm>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "tile/tile_math.h"

namespace contrastive_kernels {
namespace {

// The number of rows that are worth another thread.
int64_t grain(int64_t depth) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, depth)); }

int64_t rows_of(const at::Tensor& x) { return x.size(-1) ? x.numel() / x.size(-1) : 0; }

at::ScalarType wide(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

template <typename T>
at::Tensor unit_rows_as(const at::Tensor& x, const at::Tensor& norm) {
  const auto out = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  const int64_t depth = x.size(-1);
  const T* data = x.const_data_ptr<T>();
  T *result = out.template data_ptr<T>(), *norms = norm.data_ptr<T>();
  at::parallel_for(0, rows_of(x), grain(depth), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      norms[i] = tile_math<T>().unit_row(depth, data + i * depth, result + i * depth);
  });
  return out;
}

template <typename T>
at::Tensor unit_rows_backward_as(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& norm) {
  const auto out = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  const int64_t depth = x.size(-1);
  const T *g = grad.const_data_ptr<T>(), *data = x.const_data_ptr<T>(), *norms = norm.const_data_ptr<T>();
  T* result = out.template data_ptr<T>();
  at::parallel_for(0, rows_of(x), grain(depth), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      tile_math<T>().unit_row_backward(depth, g + i * depth, data + i * depth, norms[i], result + i * depth);
  });
  return out;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> unit_rows(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must have rows, it has shape ", x.sizes());
  const auto type = wide(x);
  auto shape = x.sizes().vec();
  shape.back() = 1;
  const auto norm = at::zeros(shape, x.options().dtype(type).memory_format(at::MemoryFormat::Contiguous));
  const auto rows = x.to(type).contiguous();
  const auto unit = type == at::kDouble ? unit_rows_as<double>(rows, norm) : unit_rows_as<float>(rows, norm);
  return {unit.to(x.scalar_type()), norm};
}

at::Tensor unit_rows_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& norm) {
  const auto type = wide(x);
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes(), "grad ", grad.sizes(), " must have the shape of x, ", x.sizes());
  TORCH_CHECK_VALUE(norm.scalar_type() == type && norm.dim() == x.dim() && norm.size(-1) == 1 &&
                        norm.sizes().slice(0, x.dim() - 1) == x.sizes().slice(0, x.dim() - 1),
                    "norm ", norm.sizes(), " must have an entry of ", type, " for every row of x ", x.sizes());
  const auto g = grad.to(type).contiguous(), rows = x.to(type).contiguous(), norms = norm.contiguous();
  const auto run = type == at::kDouble ? unit_rows_backward_as<double> : unit_rows_backward_as<float>;
  return run(g, rows, norms).to(x.scalar_type());
}

}  // namespace contrastive_kernels
