#include "operators.h"

#include <limits>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

namespace contrastive_kernels {
namespace {

template <typename T>
T dot(int64_t n, const T* __restrict a, const T* __restrict b) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) sum += a[k] * b[k];
  return sum;
}

// Finds the least similar pair j < k, the first in row-major order on a tie. A NaN is less than every number.
template <typename T>
void least_pair(int64_t views, int64_t depth, const T* sample, int64_t* pair) {
  T least = std::numeric_limits<T>::infinity();
  pair[0] = 0, pair[1] = 1;
  for (int64_t j = 0; j < views; ++j)
    for (int64_t k = j + 1; k < views; ++k) {
      const T similarity = dot(depth, sample + j * depth, sample + k * depth);
      if (!(similarity < least) && similarity == similarity) continue;
      pair[0] = j, pair[1] = k;
      if (similarity != similarity) return;
      least = similarity;
    }
}

template <typename T>
at::Tensor view_minimum_as(const at::Tensor& views) {
  const int64_t n = views.size(0), v = views.size(1), d = views.size(2);
  const auto pairs = at::empty({n, 2}, at::kLong);
  const T* data = views.template const_data_ptr<T>();
  int64_t* out = pairs.data_ptr<int64_t>();
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, v * v * d));
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) least_pair(v, d, data + i * v * d, out + i * 2);
  });
  return pairs;
}

}  // namespace

at::Tensor view_minimum(const at::Tensor& views) {
  TORCH_CHECK_VALUE(views.dim() == 3 && views.size(1) >= 2, "views ", views.sizes(), " must be (N, V, D) with V >= 2");
  return views.scalar_type() == at::kDouble ? view_minimum_as<double>(views.contiguous())
                                            : view_minimum_as<float>(views.to(at::kFloat).contiguous());
}

}  // namespace contrastive_kernels
