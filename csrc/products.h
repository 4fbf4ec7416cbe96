// The three matrix products of a sweep on tiles: scores X Y^T, and for a gradient G of the scores dX = G Y, dY = G^T X.
#pragma once

#include <memory>
#include <utility>

#include <ATen/core/Tensor.h>

#include "tile/tile_math.h"

namespace contrastive_kernels {

struct ProductsWanted {
  bool scores = false, dx = false, dy = false;
  // y is x, and dY is added to dX.
  bool self = false;
  // With `self`: no block reaches a row of dX both as a row and as a column, so that dX takes both sums at once.
  bool symmetric = false;
};

template <typename T>
class Products {
 public:
  virtual ~Products() = default;

  // The tile of scores, with kTileCols values from row to row.
  virtual void scores(Range rows, Range cols, T* s) = 0;

  // Adds what the tile g, a gradient of the scores, gives to the gradients that are wanted; dy only if `transposed`.
  // The tile's memory is free for use afterwards, and so is a row behind its last one.
  virtual void add_gradients(Range rows, Range cols, T* g, bool transposed, int64_t slot) = 0;

  // To be called at the end of a block by the thread that computed it.
  virtual void end_block() {}

  // The sums, in the dtype of x; undefined where not wanted.
  virtual std::pair<at::Tensor, at::Tensor> gradients() = 0;
};

// Whether the products of this dtype run on the processor's matrix unit.
bool has_matrix_unit(at::ScalarType dtype);

// Row and column groups have to be multiples of it.
int64_t granule(at::ScalarType dtype);

template <typename T>
std::unique_ptr<Products<T>> make_products(const at::Tensor& x, const at::Tensor& y, ProductsWanted wanted,
                                           int64_t slots);

}  // namespace contrastive_kernels
