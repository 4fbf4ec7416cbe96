"""The losses as modules, one file per family, the same as in `contrastive_kernels.functional`."""

from contrastive_kernels.modules.polarization import DistancePolarization, LMCLLoss
from contrastive_kernels.modules.softmax import ClipLoss, InfoNCELoss, MoCoLoss, NTXentLoss
from contrastive_kernels.modules.views import ArCLLoss, MoCoArCLLoss

__all__ = [
    "ArCLLoss",
    "ClipLoss",
    "DistancePolarization",
    "InfoNCELoss",
    "LMCLLoss",
    "MoCoArCLLoss",
    "MoCoLoss",
    "NTXentLoss",
]
