"""The primitives: everything that a loss is made of, and all that a loss imports."""

from contrastive_kernels.engine.spec import PLACES, Guide, compute_dtype, with_places
from contrastive_kernels.engine.terms import (
    Band,
    Count,
    DistanceHinge,
    Gaussian,
    Hinge,
    Identity,
    Softplus,
    Square,
    Student,
    Term,
)
from contrastive_kernels.engine.warn import warn
from contrastive_kernels.primitives import checks
from contrastive_kernels.primitives.devices import available_bytes, reading_is_free, reading_is_possible
from contrastive_kernels.primitives.logsumexp import similarity_logsumexp
from contrastive_kernels.primitives.moments import centred_rows, cross_moments, moments_pay, row_squares
from contrastive_kernels.primitives.rows import (
    cast_for_autocast,
    gather_rows,
    nan_unless_finite,
    row_dot,
    rows_for_distances,
    takes_double,
    unit_rows,
    wide_products,
    wide_sums,
)
from contrastive_kernels.primitives.select import cutoff_between, row_select, select_over, selecting_cutoff
from contrastive_kernels.primitives.shards import (
    ALONE,
    Group,
    Shards,
    one_process_only,
    over_ranks,
    shards_for,
    shards_of,
)
from contrastive_kernels.primitives.softmax_mean import similarity_softmax_mean
from contrastive_kernels.primitives.sums import kept_counts, kept_sums, similarity_sum
from contrastive_kernels.primitives.sweep import ALL_PAIRS, Pairs, Statistics, softmax_total, sweep, weighted_total
from contrastive_kernels.primitives.views import min_view_similarity, view_similarity

__all__ = [
    "ALL_PAIRS",
    "ALONE",
    "PLACES",
    "Band",
    "Count",
    "DistanceHinge",
    "Gaussian",
    "Group",
    "Guide",
    "Hinge",
    "Identity",
    "Pairs",
    "Shards",
    "Softplus",
    "Square",
    "Statistics",
    "Student",
    "Term",
    "available_bytes",
    "cast_for_autocast",
    "centred_rows",
    "checks",
    "compute_dtype",
    "cross_moments",
    "cutoff_between",
    "gather_rows",
    "kept_counts",
    "kept_sums",
    "min_view_similarity",
    "moments_pay",
    "nan_unless_finite",
    "one_process_only",
    "over_ranks",
    "reading_is_free",
    "reading_is_possible",
    "row_dot",
    "row_select",
    "row_squares",
    "rows_for_distances",
    "select_over",
    "selecting_cutoff",
    "shards_for",
    "shards_of",
    "similarity_logsumexp",
    "similarity_softmax_mean",
    "similarity_sum",
    "softmax_total",
    "sweep",
    "takes_double",
    "unit_rows",
    "view_similarity",
    "warn",
    "weighted_total",
    "wide_products",
    "wide_sums",
    "with_places",
]
