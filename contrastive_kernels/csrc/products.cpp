#include "products.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/zeros.h>

namespace contrastive_kernels {
namespace {

// Views of the rows of a matrix with unit column stride, and of their transpose, without a call of the dispatcher.
void* row_data(const at::Tensor& matrix, int64_t row) {
  return static_cast<char*>(matrix.data_ptr()) + row * matrix.stride(0) * matrix.element_size();
}

at::Tensor rows_of(const at::Tensor& matrix, Range rows) {
  return at::from_blob(row_data(matrix, rows.begin), {rows.size(), matrix.size(1)}, {matrix.stride(0), 1},
                       matrix.options());
}

at::Tensor transposed_rows_of(const at::Tensor& matrix, Range rows) {
  return at::from_blob(row_data(matrix, rows.begin), {matrix.size(1), rows.size()}, {1, matrix.stride(0)},
                       matrix.options());
}

at::Tensor with_unit_stride(const at::Tensor& matrix) {
  return matrix.stride(1) == 1 && matrix.stride(0) >= std::max<int64_t>(1, matrix.size(1)) ? matrix
                                                                                           : matrix.contiguous();
}

// Calls f(block, offset in the range) for the blocks of a product: those of the grid, or the whole range as one.
template <typename F>
void for_each_block(const ProductsWanted& wanted, Range range, const F& f) {
  for (int64_t begin = range.begin, end; begin < range.end; begin = end) {
    end = wanted.same_bits ? std::min(range.end, (begin / kBlock + 1) * kBlock) : range.end;
    f(Range{begin, end}, begin - range.begin);
  }
}

constexpr int64_t kFloatPanel = 64;
static_assert(kFloatPanel % kBlock == 0);
static_assert(kTileRows % kFloatPanel == 0 && kTileCols % kFloatPanel == 0);

// Writes the panels of kFloatPanel rows of y, each transposed, the last one filled up with zeros: [panels, d,
// kFloatPanel].
void transpose_panels(const at::Tensor& y, Range range, float* panels) {
  constexpr int64_t kStep = 16;  // a cache line
  const int64_t d = y.size(1);
  for (int64_t begin = range.begin; begin < range.end; begin += kFloatPanel, panels += d * kFloatPanel) {
    const int64_t height = std::min(kFloatPanel, range.end - begin);
    if (height < kFloatPanel) std::fill_n(panels, d * kFloatPanel, 0.f);
    for (int64_t first = 0; first < d; first += kStep)
      for (int64_t j = 0; j < height; ++j) {
        const float* row = static_cast<const float*>(row_data(y, begin + j));
        for (int64_t k = first; k < std::min(d, first + kStep); ++k) panels[k * kFloatPanel + j] = row[k];
      }
  }
}

// Products by the BLAS in the compute dtype, to which float16 and bfloat16 operands are converted beforehand. oneDNN's
// kernel computes the scores in float: it takes the operands as they lie, while the BLAS spends a fifth of its time on
// packing them for small d.
template <typename T>
class BlasProducts final : public Products<T> {
 public:
  BlasProducts(const at::Tensor& x, const at::Tensor& y, ProductsWanted wanted, int64_t slots)
      : wanted_(wanted), packed_(slots) {
    const auto compute = c10::CppTypeToScalarType<T>::value;
    x_ = with_unit_stride(x.to(compute));
    y_ = y.is_same(x) ? x_ : with_unit_stride(y.to(compute));
    if constexpr (std::is_same_v<T, float>) {
      if (wanted.scores && wanted.columns_return && y.numel()) {
        const int64_t panels = (y.size(0) + kFloatPanel - 1) / kFloatPanel, d = y.size(1);
        y_columns_ = at::empty({panels, d, kFloatPanel}, y_.options());
        at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
          transpose_panels(y_, {begin * kFloatPanel, std::min(end * kFloatPanel, y_.size(0))},
                           y_columns_.data_ptr<float>() + begin * d * kFloatPanel);
        });
      }
    }
    if (wanted.dx) dx_ = at::zeros(x.sizes(), x_.options());
    if (wanted.dy) dy_ = wanted.symmetric ? dx_ : at::zeros(y.sizes(), y_.options());
  }

  void scores(Range rows, Range cols, T* s, int64_t slot) override {
    if constexpr (std::is_same_v<T, float>) {
      if (y_.numel()) {
        const int64_t d = x_.size(1);
        const float* y = packed(cols, slot);
        for_each_block(wanted_, rows, [&](Range block, int64_t offset) {
          const float* x = static_cast<const float*>(row_data(x_, block.begin));
          for (int64_t j = cols.begin; j < cols.end; j += kFloatPanel)
            at::native::cpublas::brgemm(block.size(), kFloatPanel, d, x_.stride(0), kFloatPanel, kTileCols, false, x,
                                        y + (j - cols.begin) * d, s + offset * kTileCols + (j - cols.begin));
        });
        return;
      }
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    for_each_block(wanted_, rows, [&](Range row_block, int64_t row_offset) {
      for_each_block(wanted_, cols, [&](Range col_block, int64_t col_offset) {
        auto tile = tile_of(row_block, col_block, s + row_offset * kTileCols + col_offset);
        at::cpu::mm_out(tile, rows_of(x_, row_block), transposed_rows_of(y_, col_block));
      });
    });
  }

  void add_gradients(Range rows, Range cols, T* g, bool transposed, int64_t slot) override {
    if (wanted_.dx) add_dx(rows, cols, g, dx_row(rows.begin), slot);
    if (wanted_.dy && transposed) add_dy(rows, cols, g, slot);
  }

  void add_dx(Range rows, Range cols, T* g, T* sum, int64_t /*slot*/) override {
    add_product(at::from_blob(sum, {rows.size(), depth()}, x_.options()), tile_of(rows, cols, g), rows_of(y_, cols));
  }

  void add_dy(Range rows, Range cols, T* g, int64_t /*slot*/) override {
    add_product(rows_of(dy_, cols), at::from_blob(g, {cols.size(), rows.size()}, {1, kTileCols}, x_.options()),
                rows_of(x_, rows));
  }

  int64_t depth() const override { return x_.size(1); }
  T* dx_row(int64_t row) override { return static_cast<T*>(row_data(dx_, row)); }

  std::pair<at::Tensor, at::Tensor> gradients(at::ScalarType dtype) override {
    if (wanted_.dy && wanted_.self && !wanted_.symmetric) dx_.add_(dy_);
    return {wanted_.dx ? dx_.to(dtype) : dx_, wanted_.dy && !wanted_.self ? dy_.to(dtype) : at::Tensor()};
  }

 private:
  // The columns of a tile as `scores` reads them, and whose they are.
  struct Packed {
    Range range{0, 0};
    std::unique_ptr<float[]> panels;
  };

  const float* packed(Range cols, int64_t slot) {
    const int64_t d = x_.size(1);
    if (y_columns_.defined()) return y_columns_.data_ptr<float>() + cols.begin * d;
    auto& own = packed_[slot];
    if (cols.begin < own.range.begin || cols.end > own.range.end) {
      if (!own.panels) own.panels.reset(new float[kTileCols * d]);
      transpose_panels(y_, cols, own.panels.get());
      own.range = cols;
    }
    return own.panels.get() + (cols.begin - own.range.begin) * d;
  }

  at::Tensor tile_of(Range rows, Range cols, T* data) const {
    return at::from_blob(data, {rows.size(), cols.size()}, {kTileCols, 1}, x_.options());
  }

  static void add_product(at::Tensor sum, const at::Tensor& a, const at::Tensor& b) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    at::cpu::addmm_out(sum, sum, a, b, 1, 1);
  }

  ProductsWanted wanted_;
  at::Tensor x_, y_, y_columns_, dx_, dy_;
  std::vector<Packed> packed_;  // [slots]
};

// bfloat16 products with float sums on the processor's matrix unit. A right-hand operand of the unit holds pairs of
// consecutive rows side by side, [k / 2, n, 2], so both matrices are packed beforehand, in panels of kPanel rows:
// - scores:  X as it is, times the panel [d / 2, kPanel, 2] of Y^T;
// - dX_I:    G as it is, times the panel [kPanel / 2, d, 2] of Y;
// - dY_J^T:  the panel [d, kPanel] of X^T, times the pairs of rows of G. The sums stay transposed until the end.
constexpr int64_t kPanel = 128;
constexpr int64_t kDepth = 32;
static_assert(kPanel % kBlock == 0);
static_assert(kTileRows % kPanel == 0 && kTileCols % kPanel == 0);

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

class MatrixUnitProducts final : public Products<float> {
  using BFloat16 = at::BFloat16;

 public:
  MatrixUnitProducts(const at::Tensor& x, const at::Tensor& y, ProductsWanted wanted, int64_t slots)
      : wanted_(wanted), n_(x.size(0)), m_(y.size(0)), d_(x.size(1)), depth_(round_up(d_, kDepth)),
        panels_(round_up(m_, kPanel) / kPanel), buffers_(wanted.dx || wanted.dy ? new Buffer[slots] : nullptr) {
    const auto floats = x.options().dtype(at::kFloat);
    x_ = padded(x, round_up(n_, kPanel));
    const auto y_padded = y.is_same(x) ? x_ : padded(y, panels_ * kPanel);
    // The two values of a pair are neighbours in a row of y, so this transposes 32-bit units.
    if (wanted.scores)
      y_columns_ = y_padded.view(at::kInt).view({panels_, kPanel, depth_ / 2}).transpose(1, 2).contiguous();
    if (wanted.dx) {
      y_rows_ = y_padded.view({panels_ * kPanel / 2, 2, depth_}).transpose(1, 2).contiguous();
      dx_ = at::zeros({n_, depth_}, floats);
    }
    if (wanted.dy) {
      x_transposed_ = x_.view({-1, kPanel, depth_}).transpose(1, 2).contiguous();
      dy_ = at::zeros({panels_, depth_, kPanel}, floats);
    }
  }

  void scores(Range rows, Range cols, float* s, int64_t /*slot*/) override {
    for_each_block(wanted_, rows, [&](Range block, int64_t offset) {
      for (int64_t j = cols.begin; j < cols.end; j += kPanel)
        at::native::cpublas::brgemm(block.size(), kPanel, depth_, depth_, kPanel, kTileCols, false,
                                    row(x_, block.begin), columns_panel(j), s + offset * kTileCols + (j - cols.begin));
    });
  }

  void add_gradients(Range rows, Range cols, float* g, bool transposed, int64_t slot) override {
    if (!wanted_.dx && !wanted_.dy) return;
    round(rows, cols, g, slot);
    if (wanted_.dx) add_rounded_dx(rows, cols, dx_row(rows.begin), slot);
    if (wanted_.dy && transposed) add_rounded_dy(rows, cols, slot);
  }

  void add_dx(Range rows, Range cols, float* g, float* sum, int64_t slot) override {
    round(rows, cols, g, slot);
    add_rounded_dx(rows, cols, sum, slot);
  }

  void add_dy(Range rows, Range cols, float* g, int64_t slot) override {
    round(rows, cols, g, slot);
    add_rounded_dy(rows, cols, slot);
  }

  int64_t depth() const override { return depth_; }
  float* dx_row(int64_t row) override { return dx_.data_ptr<float>() + row * depth_; }

  void end_block() override { at::native::cpublas::brgemm_release(); }

  std::pair<at::Tensor, at::Tensor> gradients(at::ScalarType dtype) override {
    at::Tensor dx, dy;
    if (wanted_.dx) dx = dx_.narrow(1, 0, d_);
    if (wanted_.dy) dy = dy_.transpose(1, 2).reshape({panels_ * kPanel, depth_}).narrow(0, 0, m_).narrow(1, 0, d_);
    if (wanted_.dy && wanted_.self) dx = dx + std::exchange(dy, {});
    for (auto* gradient : {&dx, &dy})
      if (gradient->defined()) *gradient = gradient->to(dtype).contiguous();
    return {dx, dy};
  }

 private:
  struct Buffer {
    alignas(64) uint16_t rows[kTileRows * kTileCols];
    alignas(64) uint32_t pairs[kTileRows / 2 * kTileCols];
  };

  void round(Range rows, Range cols, float* g, int64_t slot) {
    const int64_t height = round_up(rows.size(), 2), width = round_up(cols.size(), kPanel);
    auto& buffer = buffers_[slot];
    // The columns past the last one are multiplied by zeros, but have to be numbers, as does the partner of an odd row.
    for (int64_t i = 0; i < rows.size(); ++i)
      std::fill(g + i * kTileCols + cols.size(), g + i * kTileCols + width, 0.f);
    if (height > rows.size()) std::fill_n(g + rows.size() * kTileCols, width, 0.f);
    for (int64_t i = 0; i < height; i += 2)
      tile_math<float>().round_rows(width, g + i * kTileCols, g + (i + 1) * kTileCols, buffer.rows + i * kTileCols,
                                    buffer.rows + (i + 1) * kTileCols, buffer.pairs + i / 2 * kTileCols);
  }

  void add_rounded_dx(Range rows, Range cols, float* sum, int64_t slot) {
    at::native::cpublas::brgemm(rows.size(), depth_, round_up(cols.size(), kPanel), kTileCols, depth_, depth_, true,
                                reinterpret_cast<const BFloat16*>(buffers_[slot].rows), row(y_rows_, cols.begin), sum);
  }

  void add_rounded_dy(Range rows, Range cols, int64_t slot) {
    const int64_t height = round_up(rows.size(), 2), width = round_up(cols.size(), kPanel);
    for (int64_t j = 0; j < width; j += kPanel)
      for (int64_t i = 0; i < height; i += kPanel)
        at::native::cpublas::brgemm(depth_, kPanel, std::min(kPanel, height - i), kPanel, kTileCols, kPanel, true,
                                    row(x_transposed_, rows.begin + i),
                                    reinterpret_cast<const BFloat16*>(buffers_[slot].pairs + i / 2 * kTileCols + j),
                                    dy_.data_ptr<float>() + (cols.begin + j) * depth_);
  }

  at::Tensor padded(const at::Tensor& matrix, int64_t rows) const {
    // A pair is read as a 32-bit unit.
    if (matrix.is_contiguous() && matrix.storage_offset() % 2 == 0 && matrix.size(0) == rows && d_ == depth_)
      return matrix;
    auto result = at::zeros({rows, depth_}, matrix.options());
    result.narrow(0, 0, matrix.size(0)).narrow(1, 0, d_).copy_(matrix);
    return result;
  }

  BFloat16* row(const at::Tensor& matrix, int64_t i) const { return matrix.data_ptr<BFloat16>() + i * depth_; }

  const BFloat16* columns_panel(int64_t j) const {
    return reinterpret_cast<const BFloat16*>(y_columns_.data_ptr<int32_t>() + j * (depth_ / 2));
  }

  ProductsWanted wanted_;
  int64_t n_, m_, d_, depth_, panels_;
  at::Tensor x_, x_transposed_, y_columns_, y_rows_, dx_, dy_;
  std::unique_ptr<Buffer[]> buffers_;  // [slots]
};

}  // namespace

bool has_matrix_unit(at::ScalarType dtype) { return dtype == at::kBFloat16 && at::native::cpublas::could_pack(dtype); }

int64_t granule(at::ScalarType dtype) { return has_matrix_unit(dtype) ? kPanel : kFloatPanel; }

template <typename T>
std::unique_ptr<Products<T>> make_products(const at::Tensor& x, const at::Tensor& y, ProductsWanted wanted,
                                           int64_t slots) {
  if constexpr (std::is_same_v<T, float>)
    if (has_matrix_unit(x.scalar_type()) && x.numel() && y.numel())
      return std::make_unique<MatrixUnitProducts>(x, y, wanted, slots);
  return std::make_unique<BlasProducts<T>>(x, y, wanted, slots);
}

template std::unique_ptr<Products<float>> make_products(const at::Tensor&, const at::Tensor&, ProductsWanted, int64_t);
template std::unique_ptr<Products<double>> make_products(const at::Tensor&, const at::Tensor&, ProductsWanted, int64_t);

}  // namespace contrastive_kernels
