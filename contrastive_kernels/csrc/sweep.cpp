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
    rules_.diagonals = description.diagonals;
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
    const auto scores = [&](Range rows, Range cols, T* s) {
      products->scores(rows, cols, s);
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
    const auto scores = [&](Range rows, Range cols, T* s) {
      if (!saved) return products->scores(rows, cols, s);
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
        const bool ids_meet = rules_.x_ids && may_be_equal(rows, cols);
        if (rules_.x_ids && rules_.keep_equal_ids && !ids_meet) return;
        scores(rows, cols, work_[slot].scores);
        const bool masked = ids_meet || rules_.cutoff || on_diagonal(rows, cols);
        f(Tile<T>{work_[slot].scores, rows, cols, masked}, diagonal, slot);
      });
      products.end_block();
    });
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
    const auto [x_least, x_most] = bounds(rules_.x_ids, rows);
    const auto [y_least, y_most] = bounds(rules_.y_ids, cols);
    return x_least <= y_most && y_least <= x_most;
  }

  static std::pair<int64_t, int64_t> bounds(const int64_t* ids, Range range) {
    int64_t least = ids[range.begin], most = least;
    for (int64_t i = range.begin; i < range.end; ++i) least = std::min(least, ids[i]), most = std::max(most, ids[i]);
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

}  // namespace contrastive_kernels
