"""Distances between the views of a sample."""

from __future__ import annotations

import torch

from .dense import reduced, unit_rows
from .similarity import first_minimum


def view_distances(views):
    """``|z_ij - z_ik|**2`` of the pairs j < k in row-major order, (N, V (V - 1) / 2)."""
    first, second = torch.combinations(torch.arange(views.shape[1], device=views.device), 2).unbind(1)
    return (views[:, first] - views[:, second]).square().sum(2)


def alignment_loss(views, *, normalize=False, reduction="mean", weight=None):
    """``mean_i mean_{j < k} |z_ij - z_ik|**2``. Source: Wang, Isola 2020, arXiv:2005.10242."""
    return reduced(view_distances(unit_rows(views, normalize)).mean(1), reduction, weight)


def augmentation_robust_loss(views, *, normalize=False, reduction="mean", weight=None):
    """``mean_i max_{j < k} |z_ij - z_ik|**2``, the first pair on a tie. Source: Zhao et al. 2023."""
    return reduced(-first_minimum(-view_distances(unit_rows(views, normalize)))[0], reduction, weight)
