#include "operators.h"

#include <algorithm>
#include <limits>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include "checks.h"
#include "products.h"
#include "tile/tile_math.h"

namespace contrastive_kernels {
namespace {

// The bytes of a thread's candidates, which limit the rows of its tiles if k is large.
constexpr int64_t kCandidateBytes = 4 << 20;

template <typename T>
std::tuple<at::Tensor, at::Tensor> row_select_as(const at::Tensor& x, const at::Tensor& y, const Rules<T>& rules,
                                                 int64_t k, bool largest) {
  const int64_t n = x.size(0), m = y.size(0), room = 2 * std::min(k, m) + 2 * kSelectStep;
  const T nothing = largest ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::infinity();
  auto values = at::full({n, k}, nothing, c10::CppTypeToScalarType<T>::value);
  auto columns = at::full({n, k}, -1, at::kLong);
  if (!n || !m) return {values, columns};

  const auto products = make_products<T>(x, y, {.scores = true, .same_bits = true, .columns_return = true}, 1);
  const int64_t fitting = kCandidateBytes / (room * static_cast<int64_t>(sizeof(Candidate<T>)));
  // As many rows in a tile as fit, but enough tiles for all threads: whole blocks of the products, or an even part of
  // one.
  const int64_t fair = (n + at::get_num_threads() - 1) / at::get_num_threads();
  int64_t height = std::min(kTileRows, (fair + kBlock - 1) / kBlock * kBlock);
  while (height > 1 && height > fitting) height = height > kBlock ? height - kBlock : height / 2;
  at::parallel_for(0, (n + height - 1) / height, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Workspace<T>> work(new Workspace<T>);
    std::vector<Candidate<T>> candidates(height * room);
    std::vector<int64_t> counts(height);
    std::vector<T> thresholds(height);
    Selection<T> selection{std::min(k, m), room, candidates.data(), counts.data(), thresholds.data()};
    for (int64_t tile = begin; tile < end; ++tile) {
      const Range rows{tile * height, std::min(n, (tile + 1) * height)};
      const Range blocks{rows.begin / kBlock * kBlock, std::min(n, (rows.end + kBlock - 1) / kBlock * kBlock)};
      std::fill(counts.begin(), counts.end(), 0);
      std::fill(thresholds.begin(), thresholds.end(), -std::numeric_limits<T>::infinity());
      for (int64_t j = 0; j < m; j += kTileCols) {
        const Range cols{j, std::min(m, j + kTileCols)};
        products->scores(blocks, cols, work->scores, 0);
        const bool masked = rules.x_ids || (rules.diagonals && rows.overlaps(cols));
        T* scores = work->scores + (rows.begin - blocks.begin) * kTileCols;
        tile_math<T>().select(rules, {scores, rows, cols, masked}, largest ? T(1) : T(-1), selection, *work);
      }
      products->end_block();
      for (int64_t i = 0; i < rows.size(); ++i) {
        const int64_t found = tile_math<T>().selected(selection, i);
        const Candidate<T>* best = selection.candidates + i * room;
        for (int64_t r = 0; r < found; ++r) {
          const auto [value, column] = best[r];
          const T number = column < 0 ? std::numeric_limits<T>::quiet_NaN() : value;
          values.template data_ptr<T>()[(rows.begin + i) * k + r] = largest ? number : -number;
          columns.data_ptr<int64_t>()[(rows.begin + i) * k + r] = column < 0 ? ~column : column;
        }
      }
    }
  });
  return {values, columns};
}

template <typename T>
std::tuple<at::Tensor, at::Tensor> row_select_of(const at::Tensor& x, const OptionalTensor& y, int64_t k, bool largest,
                                                 const OptionalTensor& x_ids, const OptionalTensor& y_ids,
                                                 bool exclude_diagonal) {
  const auto ids = x_ids ? x_ids->contiguous() : at::Tensor();
  const auto other = x_ids && y ? y_ids->contiguous() : ids;
  Rules<T> rules{};
  rules.diagonals = exclude_diagonal;
  if (x_ids) rules.x_ids = ids.const_data_ptr<int64_t>(), rules.y_ids = other.const_data_ptr<int64_t>();
  return row_select_as<T>(x, y ? *y : x, rules, k, largest);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> row_select(const at::Tensor& x, const OptionalTensor& y, int64_t k, bool largest,
                                              const OptionalTensor& x_ids, const OptionalTensor& y_ids,
                                              bool exclude_diagonal) {
  check(Inputs{.x = x, .y = y, .x_ids = x_ids, .y_ids = y_ids});
  TORCH_CHECK_VALUE(k >= 1, "k ", k, " must be at least 1");
  TORCH_CHECK_VALUE((y ? *y : x).size(0) <= std::numeric_limits<int32_t>::max(), "y has more than 2^31 rows");
  const auto run = x.scalar_type() == at::kDouble ? row_select_of<double> : row_select_of<float>;
  return run(x, y, k, largest, x_ids, y_ids, exclude_diagonal);
}

}  // namespace contrastive_kernels
