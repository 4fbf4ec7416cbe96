#include "operators.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>

#include "checks.h"
#include "products.h"
#include "schedule.h"
#include "tile/tile_math.h"

namespace contrastive_kernels {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Term term_named(std::string_view name) {
  if (name.empty()) return Term::none;
  if (name == "identity") return Term::identity;
  if (name == "count") return Term::count;
  if (name == "square") return Term::square;
  if (name == "band") return Term::band;
  if (name == "softplus") return Term::softplus;
  if (name == "hinge") return Term::hinge;
  if (name == "distance_hinge") return Term::distance_hinge;
  if (name == "student") return Term::student;
  if (name == "gaussian") return Term::gaussian;
  TORCH_CHECK_VALUE(false, "unknown term '", name, "'");
}

// The rows of a strip without gradients of the columns; a tile of columns is packed once for all of them.
constexpr int64_t kTallStrip = 4 * kTileRows;

// What one thread has of a strip of rows and of its share of the columns.
template <typename T>
struct Strip {
  Strip(int64_t height, Range share, int64_t depth, bool exponentials)
      : share(share), height(height), depth(depth), tiles((share.size() + kTileCols - 1) / kTileCols), shift(height),
        sum(height), similarity(height), shifts(exponentials ? tiles * height : 0),
        product(at::empty({height * depth}, c10::CppTypeToScalarType<T>::value)),
        kept(at::empty({exponentials ? tiles * height * kTileCols : 0}, product.options())) {}

  void clear() {
    std::fill(shift.begin(), shift.end(), -std::numeric_limits<T>::infinity());
    std::fill(sum.begin(), sum.end(), 0.0);
    std::fill(similarity.begin(), similarity.end(), 0.0);
    std::fill_n(product_at(0), height * depth, T(0));
  }

  StripSums<T> sums_at(int64_t i) { return {&shift[i], &sum[i], &similarity[i]}; }
  T* product_at(int64_t i) { return product.template data_ptr<T>() + i * depth; }
  T* shifts_at(Range cols) { return &shifts[(cols.begin - share.begin) / kTileCols * height]; }
  T* exponentials_at(Range cols) {
    return kept.template data_ptr<T>() + (cols.begin - share.begin) / kTileCols * height * kTileCols;
  }

  Range share;
  int64_t height, depth, tiles;
  std::vector<T> shift;
  std::vector<double> sum, similarity;
  std::vector<T> shifts;  // of every tile's exponentials, [tiles, height]
  // What the BLAS adds up depends on the alignment, which is that of a tensor.
  at::Tensor product;  // of the exponentials with y, [height, depth]
  at::Tensor kept;     // the exponentials, [tiles, height, kTileCols]
};

// The rows of a strip when all threads are through.
struct StripRows {
  explicit StripRows(int64_t height) : lse(height), gradient(height) {}

  template <typename T>
  double log_sum_exp(std::vector<Strip<T>>& strips, int64_t i) {
    double top = -kInfinity, sum = 0;
    for (auto& strip : strips) top = std::max<double>(top, strip.shift[i]);
    for (auto& strip : strips) sum += strip.sum[i] * (strip.shift[i] == top ? 1.0 : std::exp(strip.shift[i] - top));
    return lse[i] = top + std::log(sum);
  }

  // What an exponential with this shift is multiplied by; 0 in a row without kept pairs.
  double factor(int64_t i, double shift) const {
    return lse[i] == -kInfinity ? 0.0 : gradient[i] * std::exp(shift - lse[i]);
  }

  std::vector<double> lse, gradient;
};

// One call of an operator: the inputs as the tile functions take them, the schedule, and a workspace for each slot.
template <typename T>
class Sweep {
 public:
  Sweep(const Inputs& in, const Description& description, bool maximum)
      : self_(!in.y),
        // S and its mask are symmetric, and the sums over rows equal the sums over columns.
        symmetric_(self_ && !in.bias && !in.cutoff && !in.term_offset && !description.column_lse), x_(in.x),
        y_(self_ ? in.x : *in.y) {
    for (const double exponent : description.exponents)
      rules_.channels.push_back({exponent, symmetric_ || (description.column_lse && exponent == 1)});
    const auto plain = std::find(description.exponents.begin(), description.exponents.end(), 1.0);
    plain_channel_ = plain - description.exponents.begin();
    if (plain == description.exponents.end() && (description.column_lse || maximum))
      rules_.channels.push_back({1.0, symmetric_ || description.column_lse});

    rules_.scale = static_cast<T>(in.scale.item<double>());
    rules_.bias = hold<T>(in.bias);
    rules_.x_ids = hold<int64_t>(in.x_ids);
    rules_.y_ids = self_ ? rules_.x_ids : hold<int64_t>(in.y_ids);
    rules_.cutoff = hold<T>(in.cutoff);
    rules_.keep_equal_ids = description.keep_equal_ids;
    rules_.places = description.diagonals == kPlaces;
    rules_.diagonals = std::max<int64_t>(0, description.diagonals);
    rules_.samples = n() / std::max<int64_t>(1, description.diagonals);
    rules_.term = term_named(description.term);
    rules_.term_scale = in.term_scale ? static_cast<T>(in.term_scale->item<double>()) : T(1);
    rules_.term_offset = hold<T>(in.term_offset);
    for (size_t k = 0; k < 2; ++k)
      rules_.constants[k] = k < description.constants.size() ? static_cast<T>(description.constants[k]) : T(0);

    const int64_t threads = at::get_num_threads(), step = granule(x_.scalar_type());
    schedule_ = symmetric_ ? unordered_pairs(n(), threads, step) : all_pairs(n(), m(), threads, step);
    for (const auto& round : schedule_) slots_ = std::max<int64_t>(slots_, round.size());
    work_.reset(new Workspace<T>[slots_]);
  }

  int64_t n() const { return x_.size(0); }
  int64_t m() const { return y_.size(0); }
  int64_t channels() const { return rules_.channels.size(); }
  // The channel of exponent 1, to which the maxima and the columns' log-sum-exp belong.
  int64_t plain_channel() const { return plain_channel_; }
  bool symmetric() const { return symmetric_; }

  // Leaves the scores in `saved`, [n, m], unless it is null.
  void forward(const SideStatistics& rows, const SideStatistics& cols, T* saved) {
    const ProductsWanted products_wanted{
        .scores = true, .self = self_, .symmetric = symmetric_, .same_bits = rules_.cutoff != nullptr};
    auto products = make_products<T>(x_, y_, products_wanted, slots_);
    const auto scores = [&](Range rows, Range cols, T* s, int64_t slot) {
      products->scores(rows, cols, s, slot);
      if (!saved) return;
      for (int64_t i = 0; i < rows.size(); ++i)
        std::copy_n(s + i * kTileCols, cols.size(), saved + (rows.begin + i) * m() + cols.begin);
    };
    visit(*products, scores, [&](const Tile<T>& tile, bool diagonal, int64_t slot) {
      tile_math<T>().forward(rules_, tile, rows, diagonal ? nullptr : &cols, work_[slot]);
    });
  }

  // Takes the scores from `saved` unless it is null.
  std::pair<at::Tensor, at::Tensor> backward(const SideUpstream<T>& rows, const SideUpstream<T>& cols,
                                             const OtherGradients& gradients, const Wanted& wanted, const T* saved,
                                             at::ScalarType dtype) {
    const ProductsWanted products_wanted{.scores = !saved,
                                         .dx = wanted.x,
                                         .dy = self_ ? wanted.x : wanted.y,
                                         .self = self_,
                                         .symmetric = symmetric_,
                                         .same_bits = rules_.cutoff != nullptr};
    auto products = make_products<T>(x_, y_, products_wanted, slots_);
    for (int64_t slot = 0; slot < slots_; ++slot) work_[slot].gradients = gradients;
    const auto scores = [&](Range rows, Range cols, T* s, int64_t slot) {
      if (!saved) return products->scores(rows, cols, s, slot);
      for (int64_t i = 0; i < rows.size(); ++i)
        std::copy_n(saved + (rows.begin + i) * m() + cols.begin, cols.size(), s + i * kTileCols);
    };
    visit(*products, scores, [&](const Tile<T>& tile, bool diagonal, int64_t slot) {
      // A diagonal tile holds (i, j) and (j, i), and each of them takes the gradients of both.
      tile_math<T>().backward(rules_, tile, rows, &cols, diagonal ? 0.5 : 1.0, work_[slot]);
      products->add_gradients(tile.rows, tile.cols, tile.s, !diagonal, slot);
    });
    return products->gradients(dtype);
  }

  // Strips of rows come one after the other, and the threads share the columns. A strip's rows are complete before its
  // columns get their gradients, for which its exponentials are kept; a strip is taller where they are not.
  SoftmaxTotal softmax_total(const at::Tensor& weight, const at::Tensor& own, const SoftmaxWanted& wanted) {
    const bool dy = self_ ? wanted.x : wanted.y;
    const ProductsWanted products_wanted{.scores = true,
                                         .dx = wanted.x,
                                         .dy = dy,
                                         .self = self_,
                                         .same_bits = rules_.cutoff != nullptr,
                                         .columns_return = dy && n() > kTileRows};
    const auto shares = groups(m(), at::get_num_threads(), granule(x_.scalar_type()));
    const int64_t slots = shares.size(), height = std::min(dy ? kTileRows : kTallStrip, n() + n() % 2);
    auto products = make_products<T>(x_, y_, products_wanted, slots);
    const std::unique_ptr<Workspace<T>[]> work(new Workspace<T>[slots]);
    std::vector<Strip<T>> strips;
    for (const Range& share : shares) strips.emplace_back(height, share, wanted.x ? products->depth() : 0, dy);
    StripRows strip_rows(height);

    const at::Tensor weights = weight.contiguous(), owns = own.contiguous();
    const at::Tensor own_gradient = at::empty({n()}, weights.options());
    double total = 0, scale_gradient = 0;
    const auto in_parallel = [&](const auto& f) {
      at::parallel_for(0, slots, 1, [&](int64_t first, int64_t last) {
        for (int64_t slot = first; slot < last; ++slot) f(strips[slot], slot);
        products->end_block();
      });
    };
    for (int64_t begin = 0; begin < n(); begin += height) {
      const Range rows{begin, std::min(n(), begin + height)};
      in_parallel([&](Strip<T>& strip, int64_t slot) {
        strip.clear();
        for_each_tile({rows, strip.share}, [&](Range tile_rows, Range cols, bool) {
          T* s = dy ? strip.exponentials_at(cols) : work[slot].scores;
          const int64_t i = tile_rows.begin - begin;
          T* product = wanted.x ? strip.product_at(i) : nullptr;
          products->scores(tile_rows, cols, s, slot);
          tile_math<T>().exponentials(rules_, {s, tile_rows, cols, masked(tile_rows, cols)}, strip.sums_at(i), product,
                                      products->depth(), work[slot]);
          if (dy) std::copy_n(strip.sums_at(0).shift, rows.size(), strip.shifts_at(cols));
          if (product) products->add_dx(tile_rows, cols, s, product, slot);
        });
      });
      double part = 0;
      for (int64_t i = 0; i < rows.size(); ++i) {
        const double w = weights.const_data_ptr<T>()[begin + i];
        const double excess = strip_rows.log_sum_exp(strips, i) - owns.const_data_ptr<T>()[begin + i];
        part += w * (excess > 0 ? excess + std::log1p(std::exp(-excess)) : std::log1p(std::exp(excess)));
        // Of the same rows in every strip, so that the bits of the total do not depend on what is wanted.
        if ((i + 1) % kTileRows == 0 || i + 1 == rows.size()) total += std::exchange(part, 0.0);
        strip_rows.gradient[i] = w / (1 + std::exp(-excess));
        own_gradient.data_ptr<T>()[begin + i] = static_cast<T>(-strip_rows.gradient[i]);
        for (size_t k = 0; wanted.scale && k < strips.size(); ++k)
          scale_gradient += strip_rows.factor(i, *strips[k].sums_at(i).shift) * *strips[k].sums_at(i).similarity;
      }
      if (!wanted.x && !dy) continue;
      in_parallel([&](Strip<T>& strip, int64_t slot) {
        for (int64_t i = rows.size() * slot / slots; wanted.x && i < rows.size() * (slot + 1) / slots; ++i)
          for (Strip<T>& other : strips) {
            const T factor = static_cast<T>(rules_.scale * strip_rows.factor(i, *other.sums_at(i).shift));
            tile_math<T>().add_scaled(products->depth(), factor, other.product_at(i), products->dx_row(begin + i));
          }
        if (!dy) return;
        for_each_tile({rows, strip.share}, [&](Range, Range cols, bool) {
          T* g = strip.exponentials_at(cols);
          // This pass also brings the tile back into the cache, which the product alone would do slowly.
          for (int64_t i = 0; i < rows.size(); ++i) {
            const T factor = static_cast<T>(rules_.scale * strip_rows.factor(i, strip.shifts_at(cols)[i]));
            tile_math<T>().scaled(cols.size(), factor, g + i * kTileCols, g + i * kTileCols);
          }
          products->add_dy(rows, cols, g, slot);
        });
      });
    }
    const auto [dx, dy_or_none] = products->gradients(x_.scalar_type());
    const auto nothing = [](at::ScalarType dtype) { return at::empty({0}, dtype); };
    const auto compute = c10::CppTypeToScalarType<T>::value;
    return {.total = at::full({}, total, at::kDouble),
            .own = own_gradient,
            .x = dx.defined() ? dx : nothing(x_.scalar_type()),
            .y = dy_or_none.defined() ? dy_or_none : nothing(x_.scalar_type()),
            .scale = wanted.scale ? at::full({}, scale_gradient, compute) : nothing(compute)};
  }

  // Returns the sum over all slots.
  double total(double OtherGradients::* sum) const {
    double result = 0;
    for (int64_t slot = 0; slot < slots_; ++slot) result += work_[slot].gradients.*sum;
    return result;
  }

 private:
  // Returns the data of the tensor made contiguous, which lives as long as this object.
  template <typename S>
  const S* hold(const OptionalTensor& tensor) {
    if (!tensor) return nullptr;
    return held_.emplace_back(tensor->contiguous()).template const_data_ptr<S>();
  }

  // Calls f(tile, diagonal, slot) for every tile that may hold a kept pair, after `scores` has filled it.
  template <typename S, typename F>
  void visit(Products<T>& products, const S& scores, const F& f) {
    run(schedule_, [&](const Block& block, int64_t slot) {
      for_each_tile(block, [&](Range rows, Range cols, bool diagonal) {
        if (rules_.x_ids && rules_.keep_equal_ids && !may_be_equal(rows, cols)) return;
        scores(rows, cols, work_[slot].scores, slot);
        f(Tile<T>{work_[slot].scores, rows, cols, masked(rows, cols)}, diagonal, slot);
      });
      products.end_block();
    });
  }

  bool masked(Range rows, Range cols) const {
    const bool by_ids = rules_.x_ids && (rules_.keep_equal_ids || may_be_equal(rows, cols));
    return by_ids || rules_.cutoff || on_diagonal(rows, cols) || (rules_.places && overlap(rows, cols, place));
  }

  bool on_diagonal(Range rows, Range cols) const {
    for (int64_t k = 1 - rules_.diagonals; k < rules_.diagonals; ++k) {
      const int64_t offset = k * rules_.samples;
      if (Range{rows.begin + offset, rows.end + offset}.overlaps(cols)) return true;
    }
    return false;
  }

  // The ids are usually in order, or nearly, and few tiles need a mask.
  bool may_be_equal(Range rows, Range cols) const {
    if (rules_.places) return overlap(rows, cols, [](int64_t id) { return id >> kPlaceBits; });
    return overlap(rows, cols, [](int64_t id) { return id; });
  }

  static int64_t place(int64_t id) { return id & ((int64_t{1} << kPlaceBits) - 1); }

  // Whether the ranges of f(id) meet.
  template <typename F>
  bool overlap(Range rows, Range cols, const F& f) const {
    const auto [x_least, x_most] = bounds(rules_.x_ids, rows, f);
    const auto [y_least, y_most] = bounds(rules_.y_ids, cols, f);
    return x_least <= y_most && y_least <= x_most;
  }

  template <typename F>
  static std::pair<int64_t, int64_t> bounds(const int64_t* ids, Range range, const F& f) {
    int64_t least = f(ids[range.begin]), most = least;
    for (int64_t i = range.begin; i < range.end; ++i)
      least = std::min(least, f(ids[i])), most = std::max(most, f(ids[i]));
    return {least, most};
  }

  bool self_, symmetric_;
  at::Tensor x_, y_;
  std::vector<at::Tensor> held_;
  Rules<T> rules_;
  int64_t plain_channel_ = 0, slots_ = 0;
  Schedule schedule_;
  std::unique_ptr<Workspace<T>[]> work_;
};

// The memory of one side's running statistics, and their final values.
class Accumulators {
 public:
  Accumulators(int64_t channels, int64_t n, bool maximum, bool term)
      : shift_(at::full({channels, n}, -kInfinity, at::kDouble)), sum_(at::zeros({channels, n}, at::kDouble)),
        maximum_(at::full({maximum ? channels : 0, n}, -kInfinity, at::kDouble)),
        term_sum_(at::zeros({term ? n : 0}, at::kDouble)) {}

  SideStatistics pointers() const {
    const auto data = [](const at::Tensor& t) { return t.numel() ? t.data_ptr<double>() : nullptr; };
    return {shift_.size(1), data(shift_), data(sum_), data(maximum_), data(term_sum_)};
  }

  at::Tensor log_sum_exp() const { return shift_ + sum_.log(); }
  // The running maximum skips a NaN, the sum keeps it.
  at::Tensor maximum(int64_t channel) const {
    return maximum_.select(0, channel).masked_fill(sum_.select(0, channel).isnan(), std::nan(""));
  }
  at::Tensor term_sum() const { return term_sum_; }

 private:
  at::Tensor shift_, sum_, maximum_, term_sum_;
};

// The memory of a SideUpstream. `lse` and `grad_lse`, [count, n], belong to the channels from `first` on.
template <typename T>
class UpstreamTensors {
 public:
  UpstreamTensors(int64_t channels, int64_t n, int64_t first, const at::Tensor& grad_lse, const at::Tensor& lse,
                  const at::Tensor& grad_term_sum)
      : n_(n), grad_lse_(channels * n, T(0)), lse_(channels * n, std::numeric_limits<T>::infinity()),
        remainder_(channels * n, T(0)) {
    const auto dtype = c10::CppTypeToScalarType<T>::value;
    const auto grads = grad_lse.to(dtype).contiguous(), exact = lse.to(at::kDouble).contiguous();
    const T* grad = grads.template const_data_ptr<T>();
    const double* value = exact.template const_data_ptr<double>();
    for (int64_t i = 0, k = first * n; i < exact.numel(); ++i, ++k) {
      grad_lse_[k] = grad[i];
      if (value[i] == -kInfinity) continue;
      lse_[k] = static_cast<T>(value[i]);
      if (!std::isinf(lse_[k])) remainder_[k] = static_cast<T>(value[i] - lse_[k]);
    }
    grad_term_sum_ = grad_term_sum.to(dtype).contiguous();
  }

  SideUpstream<T> pointers() const {
    const auto* term = grad_term_sum_.numel() ? grad_term_sum_.template const_data_ptr<T>() : nullptr;
    return {n_, grad_lse_.data(), lse_.data(), remainder_.data(), term};
  }

 private:
  int64_t n_;
  std::vector<T> grad_lse_, lse_, remainder_;
  at::Tensor grad_term_sum_;
};

at::Tensor nothing(at::ScalarType dtype) { return at::empty({0}, dtype); }

template <typename T>
Statistics forward_as(const Inputs& in, const Description& description, bool maximum, bool save_scores) {
  Sweep<T> sweep(in, description, maximum);
  const bool term = !description.term.empty(), column_lse = description.column_lse;
  const Accumulators rows(sweep.channels(), sweep.n(), maximum, term);
  const Accumulators cols(column_lse ? sweep.channels() : 0, sweep.m(), maximum, false);
  const auto compute = c10::CppTypeToScalarType<T>::value;
  const auto scores = save_scores ? at::empty({sweep.n(), sweep.m()}, compute) : nothing(compute);
  sweep.forward(rows.pointers(), (sweep.symmetric() ? rows : cols).pointers(),
                save_scores ? scores.template data_ptr<T>() : nullptr);
  const auto none = [] { return nothing(at::kDouble); };  // the outputs may not share memory
  return {.row_lse = rows.log_sum_exp().narrow(0, 0, description.exponents.size()),
          .col_lse = column_lse ? cols.log_sum_exp().select(0, sweep.plain_channel()) : none(),
          .row_sum = rows.term_sum(),
          .row_max = maximum ? rows.maximum(sweep.plain_channel()) : none(),
          .col_max = maximum && column_lse ? cols.maximum(sweep.plain_channel()) : none(),
          .scores = scores};
}

template <typename T>
Gradients backward_as(const Upstream& upstream, const Inputs& in, const Description& description, const Wanted& wanted,
                      const OptionalTensor& scores, bool float32_gradients) {
  Sweep<T> sweep(in, description, false);
  const int64_t channels = sweep.channels(), n = sweep.n(), m = sweep.m();
  const auto none = nothing(at::kDouble);
  const UpstreamTensors<T> rows(channels, n, 0, upstream.grad_row_lse, upstream.row_lse,
                                description.term.empty() ? none : upstream.grad_row_sum);
  const UpstreamTensors<T> cols(description.column_lse ? channels : 0, m, sweep.plain_channel(), upstream.grad_col_lse,
                                upstream.col_lse, none);

  const auto compute = c10::CppTypeToScalarType<T>::value, exact = at::kDouble;
  const auto features = float32_gradients ? compute : in.x.scalar_type();
  const auto bias = at::zeros({wanted.bias ? m : 0}, exact);
  const auto term_offset = at::zeros({wanted.term_offset ? n : 0}, exact);
  const OtherGradients others{.bias = wanted.bias ? bias.template data_ptr<double>() : nullptr,
                              .term_offset = wanted.term_offset ? term_offset.template data_ptr<double>() : nullptr,
                              .scale_wanted = wanted.scale,
                              .term_scale_wanted = wanted.term_scale,
                              .total_wanted = wanted.total};
  const auto [dx, dy] = sweep.backward(rows.pointers(), (sweep.symmetric() ? rows : cols).pointers(), others, wanted,
                                       scores ? scores->template const_data_ptr<T>() : nullptr, features);
  const auto total = [&](bool wanted, double OtherGradients::* sum, at::ScalarType dtype) {
    return wanted ? at::full({}, sweep.total(sum), dtype) : nothing(dtype);
  };
  return {.x = dx.defined() ? dx : nothing(features),
          .y = dy.defined() ? dy : nothing(features),
          .scale = total(wanted.scale, &OtherGradients::scale, compute),
          .bias = bias.to(compute),
          .term_scale = total(wanted.term_scale, &OtherGradients::term_scale, compute),
          .term_offset = term_offset.to(compute),
          .total = total(wanted.total, &OtherGradients::total, exact)};
}

}  // namespace

Statistics forward(const Inputs& in, const Description& description, bool maximum, bool save_scores) {
  check(in, description);
  const auto run = in.x.scalar_type() == at::kDouble ? forward_as<double> : forward_as<float>;
  return run(in, description, maximum, save_scores);
}

Gradients backward(const Upstream& upstream, const Inputs& in, const Description& description, const Wanted& wanted,
                   const OptionalTensor& scores, bool float32_gradients) {
  check(in, description, wanted, scores);
  const auto run = in.x.scalar_type() == at::kDouble ? backward_as<double> : backward_as<float>;
  return run(upstream, in, description, wanted, scores, float32_gradients);
}

SoftmaxTotal softmax_total(const at::Tensor& weight, const at::Tensor& own, const Inputs& in,
                           const Description& description, const SoftmaxWanted& wanted) {
  check(weight, own, in, description);
  if (in.x.scalar_type() == at::kDouble)
    return Sweep<double>(in, description, false).softmax_total(weight, own, wanted);
  return Sweep<float>(in, description, false).softmax_total(weight, own, wanted);
}

}  // namespace contrastive_kernels
