"""The losses as functions, one file per family."""

from contrastive_kernels.functional.alignment import alignment_loss, augmentation_robust_loss
from contrastive_kernels.functional.common import ContrastiveStats
from contrastive_kernels.functional.distance import t_simclr_loss, uniformity_loss
from contrastive_kernels.functional.labels import label_pull_loss, sup_con_loss
from contrastive_kernels.functional.margin import MMCLStats, mmcl_loss
from contrastive_kernels.functional.moments import barlow_twins_loss, spectral_contrastive_loss, vicreg_loss
from contrastive_kernels.functional.negatives import debiased_loss, hard_negative_loss
from contrastive_kernels.functional.neighbors import easy_negative_loss, false_negative_loss, nnclr_loss
from contrastive_kernels.functional.pairwise import siglip_loss, triplet_margin_loss
from contrastive_kernels.functional.polarization import Polarization, distance_polarization
from contrastive_kernels.functional.softmax import clip_loss, info_nce_loss, moco_loss, nt_xent_loss
from contrastive_kernels.functional.variants import decoupled_loss, quick_thoughts_loss
from contrastive_kernels.functional.views import arcl_loss, moco_arcl_loss

__all__ = [
    "ContrastiveStats",
    "MMCLStats",
    "Polarization",
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
    "mmcl_loss",
    "moco_arcl_loss",
    "moco_loss",
    "nnclr_loss",
    "nt_xent_loss",
    "quick_thoughts_loss",
    "siglip_loss",
    "spectral_contrastive_loss",
    "sup_con_loss",
    "t_simclr_loss",
    "triplet_margin_loss",
    "uniformity_loss",
    "vicreg_loss",
]
