"""The losses as modules, one file per family, the same as in `contrastive_kernels.functional`."""

from contrastive_kernels.modules.alignment import AlignmentLoss, AugmentationRobustLoss
from contrastive_kernels.modules.distance import TSimCLRLoss, UniformityLoss
from contrastive_kernels.modules.labels import LabelPullLoss, SupConLoss
from contrastive_kernels.modules.margin import MMCLLoss
from contrastive_kernels.modules.moments import BarlowTwinsLoss, SpectralContrastiveLoss, VICRegLoss
from contrastive_kernels.modules.negatives import DebiasedLoss, HardNegativeLoss
from contrastive_kernels.modules.neighbors import EasyNegativeLoss, FalseNegativeLoss, NNCLRLoss
from contrastive_kernels.modules.pairwise import SigLipLoss, TripletMarginLoss
from contrastive_kernels.modules.polarization import DistancePolarization, LMCLLoss
from contrastive_kernels.modules.softmax import ClipLoss, InfoNCELoss, MoCoLoss, NTXentLoss
from contrastive_kernels.modules.variants import DecoupledLoss, QuickThoughtsLoss
from contrastive_kernels.modules.views import ArCLLoss, MoCoArCLLoss

__all__ = [
    "AlignmentLoss",
    "ArCLLoss",
    "AugmentationRobustLoss",
    "BarlowTwinsLoss",
    "ClipLoss",
    "DebiasedLoss",
    "DecoupledLoss",
    "DistancePolarization",
    "EasyNegativeLoss",
    "FalseNegativeLoss",
    "HardNegativeLoss",
    "InfoNCELoss",
    "LMCLLoss",
    "LabelPullLoss",
    "MMCLLoss",
    "MoCoArCLLoss",
    "MoCoLoss",
    "NNCLRLoss",
    "NTXentLoss",
    "QuickThoughtsLoss",
    "SigLipLoss",
    "SpectralContrastiveLoss",
    "SupConLoss",
    "TSimCLRLoss",
    "TripletMarginLoss",
    "UniformityLoss",
    "VICRegLoss",
]
