"""What a person wants to know of trained features: numbers without the N x N matrix, and pictures of them.

Without gradient, except `alignment`, `uniformity`, `info_nce_split` and `spectral_population_loss`. Memory is
O(N * D) plus a bounded workspace; results that are K x K (pairs of classes) or n x n (small distributions) say so, and
`mmcl_dual` stores N x N matrices.

A result does not depend on where it is taken: autocast is off inside, half precision is widened to float32 before rows
are normalised, and goes with float32. Only `torch.set_float32_matmul_precision`, of the whole process, counts here too.
Broken data shows: NaN gives NaN, a pair without a finite distance is counted, a rank of NaN is the last. Checks of
values, such as of a target, wait for the device.
"""

from contrastive_kernels.diagnostics.alignment import InfoNCESplit, alignment, info_nce_split, uniformity
from contrastive_kernels.diagnostics.classes import (
    CentreBound,
    Classification,
    ClassMeans,
    augmented_distance,
    centre_bound,
    class_means,
    class_similarity,
    classify,
)
from contrastive_kernels.diagnostics.distances import BandCount, DistanceHistogram, band_count, distance_histogram
from contrastive_kernels.diagnostics.false_negatives import FalseNegativeMass, false_negative_mass
from contrastive_kernels.diagnostics.margin import mmcl_dual
from contrastive_kernels.diagnostics.multi_view import classify_views
from contrastive_kernels.diagnostics.plots import (
    plot_class_similarity,
    plot_distance_histogram,
    plot_rank_distribution,
)
from contrastive_kernels.diagnostics.retrieval import positive_rank, retrieval_accuracy
from contrastive_kernels.diagnostics.robustness import adversarial_radius
from contrastive_kernels.diagnostics.spectral import (
    SpectralOptimum,
    normalized_adjacency,
    spectral_optimum,
    spectral_population_loss,
)

__all__ = [
    "BandCount",
    "CentreBound",
    "ClassMeans",
    "Classification",
    "DistanceHistogram",
    "FalseNegativeMass",
    "InfoNCESplit",
    "SpectralOptimum",
    "adversarial_radius",
    "alignment",
    "augmented_distance",
    "band_count",
    "centre_bound",
    "class_means",
    "class_similarity",
    "classify",
    "classify_views",
    "distance_histogram",
    "false_negative_mass",
    "info_nce_split",
    "mmcl_dual",
    "normalized_adjacency",
    "plot_class_similarity",
    "plot_distance_histogram",
    "plot_rank_distribution",
    "positive_rank",
    "retrieval_accuracy",
    "spectral_optimum",
    "spectral_population_loss",
    "uniformity",
]
