"""The dense reference: every loss as its formula, in plain PyTorch, any dtype, with the N x M matrix in memory.

``getattr(python_ref, name)(*inputs, **arguments)`` is the oracle of ``getattr(contrastive_kernels, name)``.
"""

from .dense import Statistics, unit_rows
from .polarization import distance_polarization, polarization_term
from .similarity import min_view_similarity, similarity_logsumexp, similarity_sum
from .softmax import clip_loss, info_nce_loss, moco_loss, nt_xent_loss
from .views import arcl_loss, moco_arcl_loss

__all__ = [
    "Statistics",
    "arcl_loss",
    "clip_loss",
    "distance_polarization",
    "info_nce_loss",
    "min_view_similarity",
    "moco_arcl_loss",
    "moco_loss",
    "nt_xent_loss",
    "polarization_term",
    "similarity_logsumexp",
    "similarity_sum",
    "unit_rows",
]
