// The order in which a sweep visits the pairs. A sweep is a list of rounds, and a round is a list of blocks that run at
// the same time.
//
// No two blocks of a round share a row group or a column group. So every thread accumulates the statistics and
// gradients of its rows and columns in place: without locks, without a copy for each thread, and with the same sums in
// every run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <ATen/Parallel.h>

#include "tile/tile_math.h"

namespace contrastive_kernels {

struct Block {
  Range rows, cols;
  // True if rows == cols, and only the pairs on and above the diagonal are visited.
  bool triangle = false;
};

using Schedule = std::vector<std::vector<Block>>;

// Returns `count` groups of about equal size, or fewer if there are not enough rows for multiples of `granule`.
std::vector<Range> groups(int64_t n, int64_t count, int64_t granule);

// Returns the blocks of all pairs of n rows and m columns, in groups whose sizes are multiples of `granule`.
Schedule all_pairs(int64_t n, int64_t m, int64_t threads, int64_t granule);

// Returns the blocks of all unordered pairs of n rows, the pairs (i, i) included.
Schedule unordered_pairs(int64_t n, int64_t threads, int64_t granule);

// Calls f(rows, cols, diagonal) for every tile of a block, all rows of some columns before the next columns. A diagonal
// tile is square, and no other tile of a triangle holds pairs (i, i).
template <typename F>
void for_each_tile(const Block& block, const F& f) {
  for (int64_t j = block.cols.begin; j < block.cols.end; j += kTileCols) {
    const Range cols{j, std::min(j + kTileCols, block.cols.end)};
    const int64_t above = block.triangle ? j : block.rows.end;
    for (int64_t i = block.rows.begin; i < above; i += kTileRows) f({i, std::min(i + kTileRows, above)}, cols, false);
    if (!block.triangle) continue;
    for (int64_t i = j; i < cols.end; i += kTileRows) {
      const Range rows{i, std::min(i + kTileRows, cols.end)};
      f(rows, rows, true);
      if (rows.end < cols.end) f(rows, Range{rows.end, cols.end}, false);
    }
  }
}

// Calls f(block, slot) for every block. No two threads use a slot at the same time.
template <typename F>
void run(const Schedule& schedule, const F& f) {
  for (const auto& round : schedule)
    at::parallel_for(0, static_cast<int64_t>(round.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) f(round[slot], slot);
    });
}

}  // namespace contrastive_kernels
