"""Large-margin contrastive learning: another loss with the distance polarization."""

from __future__ import annotations

from ._polarization import Polarization
from .debiased import debiased_loss
from .hard_negative import hard_negative_loss
from .info_nce import info_nce_loss
from .nt_xent import nt_xent_loss
from .quick_thoughts import quick_thoughts_loss

BASES = {
    "nt_xent": nt_xent_loss,
    "info_nce": info_nce_loss,
    "quick_thoughts": quick_thoughts_loss,
    "debiased": debiased_loss,
    "hard_negative": hard_negative_loss,
}


def lmcl_loss(first, second, base="nt_xent", *, lower=0.1, upper=0.5, weight=0.1, **options):
    """Return the base loss plus weight times the polarization of its negative pairs; options are those of the base.

    Source: Chen et al. 2021.
    """
    return BASES[base](first, second, polarization=Polarization(lower, upper, weight), **options)
