"""Contrastive losses for PyTorch that never build the N x N similarity matrix."""

from contrastive_kernels.functional import (
    ContrastiveStats,
    Polarization,
    arcl_loss,
    clip_loss,
    distance_polarization,
    info_nce_loss,
    moco_arcl_loss,
    moco_loss,
    nt_xent_loss,
)
from contrastive_kernels.modules import (
    ArCLLoss,
    ClipLoss,
    DistancePolarization,
    InfoNCELoss,
    LMCLLoss,
    MoCoArCLLoss,
    MoCoLoss,
    NTXentLoss,
)
from contrastive_kernels.similarity import min_view_similarity, similarity_logsumexp, similarity_sum
from contrastive_kernels.sweep import Band, Count, Gaussian, Hinge, Identity, Softplus, Square

__version__ = "0.1.0"

__all__ = [
    "ArCLLoss",
    "Band",
    "ClipLoss",
    "ContrastiveStats",
    "Count",
    "DistancePolarization",
    "Gaussian",
    "Hinge",
    "Identity",
    "InfoNCELoss",
    "LMCLLoss",
    "MoCoArCLLoss",
    "MoCoLoss",
    "NTXentLoss",
    "Polarization",
    "Softplus",
    "Square",
    "arcl_loss",
    "clip_loss",
    "distance_polarization",
    "info_nce_loss",
    "min_view_similarity",
    "moco_arcl_loss",
    "moco_loss",
    "nt_xent_loss",
    "similarity_logsumexp",
    "similarity_sum",
]
