"""The dense reference: every loss as its formula, in plain PyTorch, any dtype, with the N x M matrix in memory.

``getattr(python_ref, name)(*inputs, **arguments)`` is the oracle of ``getattr(contrastive_kernels, name)``.
"""

from .alignment import alignment_loss, augmentation_robust_loss
from .dense import Statistics, unit_rows
from .distance import t_simclr_loss, uniformity_loss
from .labels import label_pull_loss, sup_con_loss
from .margin import mmcl_loss
from .moments import barlow_twins_loss, spectral_contrastive_loss, vicreg_loss
from .negatives import debiased_loss, hard_negative_loss
from .neighbors import easy_negative_loss, false_negative_loss, nnclr_loss, row_select
from .pairwise import siglip_loss, triplet_margin_loss
from .polarization import distance_polarization, polarization_term
from .similarity import min_view_similarity, similarity_logsumexp, similarity_sum
from .softmax import clip_loss, info_nce_loss, moco_loss, nt_xent_loss
from .variants import decoupled_loss, quick_thoughts_loss
from .views import arcl_loss, moco_arcl_loss

__all__ = [
    "Statistics",
    "alignment_loss",
    "arcl_loss",
    "augmentation_robust_loss",
    "barlow_twins_loss",
    "clip_loss",
    "debiased_loss",
    "decoupled_loss",
    "distance_polarization",
    "easy_negative_loss",
    "false_negative_loss",
    "hard_negative_loss",
    "info_nce_loss",
    "label_pull_loss",
    "min_view_similarity",
    "mmcl_loss",
    "moco_arcl_loss",
    "moco_loss",
    "nnclr_loss",
    "nt_xent_loss",
    "polarization_term",
    "quick_thoughts_loss",
    "row_select",
    "siglip_loss",
    "similarity_logsumexp",
    "similarity_sum",
    "spectral_contrastive_loss",
    "sup_con_loss",
    "t_simclr_loss",
    "triplet_margin_loss",
    "uniformity_loss",
    "unit_rows",
    "vicreg_loss",
]
