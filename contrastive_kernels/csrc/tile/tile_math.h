// The functions on one tile of similarities (logits, masks, exponentials, terms) and on one row of features: plain C++
// over raw memory. schedule.h decides which rows and columns a tile holds, products.h computes its scores.
#pragma once

#include <cstdint>
#include <vector>

namespace contrastive_kernels {

// A tile of scores stays in the L2 cache (512 KiB in float), a row of it in the L1 cache.
constexpr int64_t kTileRows = 256;
constexpr int64_t kTileCols = 512;

// The lower bits of an id that hold a place.
constexpr int kPlaceBits = 32;

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
  bool overlaps(Range other) const { return begin < other.end && other.begin < end; }
};

enum class Term { none, identity, count, square, band, softplus, hinge, distance_hinge, student, gaussian };

// One log-sum-exp, of exp(exponent * scale * s + bias), over every row and perhaps over every column.
struct Channel {
  double exponent;
  bool column_lse;
};

// What a sweep computes, and the vectors that it reads, null if not given.
template <typename T>
struct Rules {
  std::vector<Channel> channels;
  T scale;
  const T* bias;
  const int64_t* x_ids;
  const int64_t* y_ids;
  const T* cutoff;
  bool keep_equal_ids;
  // An id is a class and, in its kPlaceBits lower bits, a place; pairs of equal places are dropped.
  bool places = false;
  // The pairs (i, i + k * samples) with |k| < diagonals are dropped.
  int64_t diagonals = 0, samples = 0;
  Term term;
  T term_scale;
  const T* term_offset;
  T constants[2];
};

template <typename T>
struct Tile {
  T* s;  // [rows, kTileCols]
  Range rows, cols;
  // False if every pair of the tile is kept.
  bool masked;
};

// The running statistics of one side, rows or columns: log-sum-exp = shift + log(sum), one row of n for each channel.
struct SideStatistics {
  int64_t n;
  double* shift;     // [channels, n]
  double* sum;       // [channels, n]
  double* maximum;   // [channels, n] or null
  double* term_sum;  // [n] or null
};

// The gradients of one side's statistics, and its log-sum-exps. A log-sum-exp is a sum of two T, because rounding 100
// to float would shift the weights of a whole row by 4e-6; it is +inf where no pair was kept.
template <typename T>
struct SideUpstream {
  int64_t n;
  const T* grad_lse;       // [channels, n]
  const T* lse;            // [channels, n]
  const T* lse_remainder;  // [channels, n]
  const T* grad_term_sum;  // [n] or null
};

// What rows have of the columns so far, for the total of a softmax: of each row the sum of exp(logit - shift), and that
// of the exponentials times the similarities.
template <typename T>
struct StripSums {
  T* shift;
  double *sum, *similarity;
};

// The gradients besides dX and dY. Each slot has its own sums over pairs; all slots share the vectors, which are null
// if not wanted. `total` is the sum of the term's values times their gradients, for a sweep without log-sum-exps.
struct OtherGradients {
  double scale = 0;
  double term_scale = 0;
  double total = 0;
  double* bias = nullptr;         // [m]
  double* term_offset = nullptr;  // [n]
  bool scale_wanted = false;
  bool term_scale_wanted = false;
  bool total_wanted = false;
};

// One slot's memory, about 1 MiB in float. Every buffer holds one thing, and no two share memory.
template <typename T>
struct Workspace {
  alignas(64) T scores[kTileRows * kTileCols];
  // Forward: the logits of every channel but the last, whose logits replace the scores.
  alignas(64) T tile_logits[kTileRows * kTileCols];

  // Forward, one value for each row or column of the tile: the largest logit, the shift and the sum of exponentials.
  alignas(64) T row_top[kTileRows], row_shift[kTileRows], row_sum[kTileRows];
  alignas(64) T col_top[kTileCols], col_shift[kTileCols], col_sum[kTileCols];
  // Backward, one value for each row or column of the tile: what multiplies the shared exponentials.
  alignas(64) T row_factor[kTileRows], col_factor[kTileCols];

  // The rest holds one row of the tile, from the start of the row's turn to its end.
  // Both sweeps and the selection: 1 where the pair is kept.
  alignas(64) uint8_t kept[kTileCols];
  // Forward in one pass, and channel_weights: one channel's logits.
  alignas(64) T logits[kTileCols];
  // Backward: the weights of all channels' log-sum-exps, and one channel's part of the bias's gradient.
  alignas(64) T weights[kTileCols], bias_weights[kTileCols];
  // Both sweeps: what the term's arguments are linear in, unless it is the scores. The values take the arguments' place
  // in the forward sweep, the slopes do so in the backward sweep.
  alignas(64) T term_base[kTileCols], term_values[kTileCols], term_slopes[kTileCols];

  // The number of tiles whose precomputed shift failed.
  int64_t misses = 0;
  OtherGradients gradients;
};

// One of a row's best columns so far. A NaN is stored as an infinite value with the complement of its column.
template <typename T>
struct Candidate {
  T value;
  int32_t column;
};

// The number of columns that are compared with the threshold together.
constexpr int64_t kSelectStep = 64;

// The candidates for the best columns of each row, in no order: every value above the threshold, which was the k-th
// best of the row at some time. There is room for k and at least two steps.
template <typename T>
struct Selection {
  int64_t k, room;
  Candidate<T>* candidates;  // [rows, room]
  int64_t* counts;           // [rows]
  T* thresholds;             // [rows]
};

// The functions, compiled for one instruction set.
template <typename T>
struct TileMath {
  const char* instruction_set;
  // Adds a tile to the statistics of its rows and, unless null, of its columns.
  void (*forward)(const Rules<T>&, const Tile<T>&, const SideStatistics& rows, const SideStatistics* cols,
                  Workspace<T>&);
  // Replaces the scores s of a tile by dL/ds, and adds to the other gradients. The columns' statistics contribute
  // unless `cols` is null. `weight` multiplies what the tile adds to the sums.
  void (*backward)(const Rules<T>&, const Tile<T>&, const SideUpstream<T>& rows, const SideUpstream<T>* cols,
                   double weight, Workspace<T>&);
  // Replaces the scores of a tile by exp(logit - shift), 0 where a pair is dropped, and adds it to the sums of its
  // rows. A shift is the largest logit so far: where it moves, the row of `product`, [rows, depth] or null, follows.
  void (*exponentials)(const Rules<T>&, const Tile<T>&, StripSums<T>, T* product, int64_t depth, Workspace<T>&);
  // sum += factor v
  void (*add_scaled)(int64_t n, T factor, const T* v, T* sum);
  // out = factor v
  void (*scaled)(int64_t n, T factor, const T* v, T* out);
  // Rounds the n values of two rows to bfloat16: into a row each, and into pairs of one column.
  void (*round_rows)(int64_t n, const float* first, const float* second, uint16_t* first_out, uint16_t* second_out,
                     uint32_t* pairs);
  // Adds a tile, times `sign`, to the candidates of its rows. The tiles have to come in ascending order of columns.
  void (*select)(const Rules<T>&, const Tile<T>&, T sign, Selection<T>&, Workspace<T>&);
  // Sorts the best columns of a row and returns their number.
  int64_t (*selected)(Selection<T>&, int64_t row);
  // Divides a row by its norm, and returns the norm.
  T (*unit_row)(int64_t n, const T* x, T* out);
  // Computes the gradient of the row.
  void (*unit_row_backward)(int64_t n, const T* grad, const T* x, T norm, T* out);
};

// Returns the functions for the best instruction set of this processor.
template <typename T>
const TileMath<T>& tile_math();

}  // namespace contrastive_kernels
