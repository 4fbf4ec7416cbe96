// The three matrix products of a sweep on tiles: scores X Y^T, and for a gradient G of the scores dX = G Y, dY = G^T X.
#pragma once

#include <memory>
#include <utility>

#include <ATen/core/Tensor.h>

#include "tile/tile_math.h"

namespace contrastive_kernels {

// The grid of the blocks whose scores have the same bits wherever they are computed; tiles begin on it.
constexpr int64_t kBlock = 64;

struct ProductsWanted {
  bool scores = false, dx = false, dy = false;
  // y is x, and dY is added to dX.
  bool self = false;
  // With `self`: no block reaches a row of dX both as a row and as a column, so that dX takes both sums at once.
  bool symmetric = false;
  // A score has the same bits in every tile that holds it: a cutoff is compared with what was selected before, and
  // with what the backward computes again.
  bool same_bits = false;
  // The columns of a tile return after those of other tiles: they are packed once, all of them, and not when they come.
  bool columns_return = false;
};

template <typename T>
class Products {
 public:
  virtual ~Products() = default;

  // The tile of scores, with kTileCols values from row to row.
  virtual void scores(Range rows, Range cols, T* s, int64_t slot) = 0;

  // Adds the products of the tile g, a gradient of the scores, to dX and, if `transposed`, to dY, as far as wanted. May
  // overwrite the tile and one row past its end.
  virtual void add_gradients(Range rows, Range cols, T* g, bool transposed, int64_t slot) = 0;

  // The two products of `add_gradients`, one at a time; that of dX is added to `sum`, [rows, depth()].
  virtual void add_dx(Range rows, Range cols, T* g, T* sum, int64_t slot) = 0;
  virtual void add_dy(Range rows, Range cols, T* g, int64_t slot) = 0;

  // The length of the rows of dX as they are stored until the end, and such a row.
  virtual int64_t depth() const = 0;
  virtual T* dx_row(int64_t row) = 0;

  // The thread that computed a block calls this at the end of the block.
  virtual void end_block() {}

  // Returns dX and dY in this dtype, undefined if not wanted.
  virtual std::pair<at::Tensor, at::Tensor> gradients(at::ScalarType dtype) = 0;
};

// Returns whether the products of this dtype run on the processor's matrix unit.
bool has_matrix_unit(at::ScalarType dtype);

// The sizes of row and column groups have to be multiples of this.
int64_t granule(at::ScalarType dtype);

template <typename T>
std::unique_ptr<Products<T>> make_products(const at::Tensor& x, const at::Tensor& y, ProductsWanted wanted,
                                           int64_t slots);

}  // namespace contrastive_kernels
