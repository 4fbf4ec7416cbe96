"""The losses, one file each: a function and the module that holds its options."""

from contrastive_kernels.losses._arguments import ContrastiveStats
from contrastive_kernels.losses._polarization import Polarization
from contrastive_kernels.losses.alignment import AlignmentLoss, alignment_loss
from contrastive_kernels.losses.arcl import ArCLLoss, arcl_loss
from contrastive_kernels.losses.augmentation_robust import AugmentationRobustLoss, augmentation_robust_loss
from contrastive_kernels.losses.barlow_twins import BarlowTwinsLoss, barlow_twins_loss
from contrastive_kernels.losses.byol import BYOLLoss, byol_loss
from contrastive_kernels.losses.clip import ClipLoss, clip_loss
from contrastive_kernels.losses.debiased import DebiasedLoss, debiased_loss
from contrastive_kernels.losses.decoupled import DecoupledLoss, decoupled_loss
from contrastive_kernels.losses.distance_polarization import DistancePolarization, distance_polarization
from contrastive_kernels.losses.easy_negative import EasyNegativeLoss, easy_negative_loss
from contrastive_kernels.losses.false_negative import FalseNegativeLoss, false_negative_loss
from contrastive_kernels.losses.hard_negative import HardNegativeLoss, hard_negative_loss
from contrastive_kernels.losses.info_nce import InfoNCELoss, info_nce_loss
from contrastive_kernels.losses.label_pull import LabelPullLoss, label_pull_loss
from contrastive_kernels.losses.lmcl import LMCLLoss
from contrastive_kernels.losses.mmcl import MMCLLoss, MMCLStats, mmcl_loss
from contrastive_kernels.losses.moco import MoCoLoss, moco_loss
from contrastive_kernels.losses.moco_arcl import MoCoArCLLoss, moco_arcl_loss
from contrastive_kernels.losses.nnclr import NNCLRLoss, nnclr_loss
from contrastive_kernels.losses.nt_xent import NTXentLoss, nt_xent_loss
from contrastive_kernels.losses.quick_thoughts import QuickThoughtsLoss, quick_thoughts_loss
from contrastive_kernels.losses.siglip import SigLipLoss, siglip_loss
from contrastive_kernels.losses.simsiam import SimSiamLoss, simsiam_loss
from contrastive_kernels.losses.spectral_contrastive import SpectralContrastiveLoss, spectral_contrastive_loss
from contrastive_kernels.losses.sup_con import SupConLoss, sup_con_loss
from contrastive_kernels.losses.t_simclr import TSimCLRLoss, t_simclr_loss
from contrastive_kernels.losses.triplet_margin import TripletMarginLoss, triplet_margin_loss
from contrastive_kernels.losses.uniformity import UniformityLoss, uniformity_loss
from contrastive_kernels.losses.vicreg import VICRegLoss, vicreg_loss

__all__ = [
    "AlignmentLoss",
    "ArCLLoss",
    "AugmentationRobustLoss",
    "BYOLLoss",
    "BarlowTwinsLoss",
    "ClipLoss",
    "ContrastiveStats",
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
    "MMCLStats",
    "MoCoArCLLoss",
    "MoCoLoss",
    "NNCLRLoss",
    "NTXentLoss",
    "Polarization",
    "QuickThoughtsLoss",
    "SigLipLoss",
    "SimSiamLoss",
    "SpectralContrastiveLoss",
    "SupConLoss",
    "TSimCLRLoss",
    "TripletMarginLoss",
    "UniformityLoss",
    "VICRegLoss",
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
    "mmcl_loss",
    "moco_arcl_loss",
    "moco_loss",
    "nnclr_loss",
    "nt_xent_loss",
    "quick_thoughts_loss",
    "siglip_loss",
    "simsiam_loss",
    "spectral_contrastive_loss",
    "sup_con_loss",
    "t_simclr_loss",
    "triplet_margin_loss",
    "uniformity_loss",
    "vicreg_loss",
]
