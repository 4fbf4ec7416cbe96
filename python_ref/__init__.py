"""The dense reference: every loss as its formula, in plain PyTorch, any dtype, with the N x M matrix in memory.

``getattr(python_ref, name)(*inputs, **arguments)`` is the oracle of ``getattr(contrastive_kernels, name)``, and
`lmcl_loss` of the module ``LMCLLoss``. Each loss has its own file ``<name>.py``; underscored files hold shared parts.
"""

from ._dense import unit_rows
from ._polarization import polarization_term
from ._softmax import Statistics
from .alignment import alignment_loss
from .arcl import arcl_loss
from .augmentation_robust import augmentation_robust_loss
from .barlow_twins import barlow_twins_loss
from .byol import byol_loss
from .clip import clip_loss
from .debiased import debiased_loss
from .decoupled import decoupled_loss
from .distance_polarization import distance_polarization
from .easy_negative import easy_negative_loss
from .false_negative import false_negative_loss
from .hard_negative import hard_negative_loss
from .info_nce import info_nce_loss
from .label_pull import label_pull_loss
from .lmcl import lmcl_loss
from .logsumexp import similarity_logsumexp
from .mmcl import mmcl_loss
from .moco import moco_loss
from .moco_arcl import moco_arcl_loss
from .nnclr import nnclr_loss
from .nt_xent import nt_xent_loss
from .quick_thoughts import quick_thoughts_loss
from .select import row_select
from .siglip import siglip_loss
from .simsiam import simsiam_loss
from .softmax_mean import similarity_softmax_mean
from .spectral_contrastive import spectral_contrastive_loss
from .sums import similarity_sum
from .sup_con import sup_con_loss
from .t_simclr import t_simclr_loss
from .triplet_margin import triplet_margin_loss
from .uniformity import uniformity_loss
from .vicreg import vicreg_loss
from .views import min_view_similarity

__all__ = [
    "Statistics",
    "alignment_loss",
    "arcl_loss",
    "augmentation_robust_loss",
    "barlow_twins_loss",
    "byol_loss",
    "clip_loss",
    "debiased_loss",
    "decoupled_loss",
    "distance_polarization",
    "easy_negative_loss",
    "false_negative_loss",
    "hard_negative_loss",
    "info_nce_loss",
    "label_pull_loss",
    "lmcl_loss",
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
    "similarity_softmax_mean",
    "similarity_sum",
    "simsiam_loss",
    "spectral_contrastive_loss",
    "sup_con_loss",
    "t_simclr_loss",
    "triplet_margin_loss",
    "uniformity_loss",
    "unit_rows",
    "vicreg_loss",
]
