"""The losses as functions, one file per family."""

from contrastive_kernels.functional.common import ContrastiveStats
from contrastive_kernels.functional.polarization import Polarization, distance_polarization
from contrastive_kernels.functional.softmax import clip_loss, info_nce_loss, moco_loss, nt_xent_loss
from contrastive_kernels.functional.views import arcl_loss, moco_arcl_loss

__all__ = [
    "ContrastiveStats",
    "Polarization",
    "arcl_loss",
    "clip_loss",
    "distance_polarization",
    "info_nce_loss",
    "moco_arcl_loss",
    "moco_loss",
    "nt_xent_loss",
]
