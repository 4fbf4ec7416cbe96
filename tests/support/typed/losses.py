"""Every loss is a tensor, whose backward has a type."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

import contrastive_kernels as ck

a, b, c = (normalize(torch.randn(8, 4), dim=1).requires_grad_() for _ in range(3))
views = normalize(torch.randn(8, 3, 4), dim=2).requires_grad_()
labels = torch.arange(8) % 3
temperature = torch.tensor(0.1, requires_grad=True)

# Expressions of a training loop.
ck.nt_xent_loss(a, b).backward()
(0.5 * ck.clip_loss(a, b, 10.0)).backward()
total = ck.info_nce_loss(a, b, temperature=temperature) + 0.5 * ck.uniformity_loss(a)
total.backward()
value: float = total.item()
per_row: Tensor = ck.info_nce_loss(a, b, c, temperature=0.1, reduction="none", weight=torch.ones(8))
per_row[labels == 0].mean()

losses: list[Tensor] = [
    ck.alignment_loss(views),
    ck.arcl_loss(views, positive="mean"),
    ck.augmentation_robust_loss(views),
    ck.barlow_twins_loss(a, b, lambd=0.01),
    ck.byol_loss(a, b, c, b, reduction="sum"),
    ck.clip_loss(a, b, 10.0),
    ck.debiased_loss(a, b, tau_plus=0.05),
    ck.decoupled_loss(a, b, positive_weight=lambda x, y: (x * y).sum(1)),
    ck.decoupled_loss(a, b, positive_weight=(torch.ones(8), torch.ones(8))),
    ck.distance_polarization(a, labels),
    ck.easy_negative_loss(a, b, k=3),
    ck.false_negative_loss(a, b, mode="attract"),
    ck.hard_negative_loss(a, b, beta=0.5),
    ck.info_nce_loss(a, b),
    ck.info_nce_loss(a, b, guide=(a, b), guide_cutoff=0.5),
    ck.label_pull_loss(a, labels, torch.randn(3, 4)),
    ck.mmcl_loss(a, b),
    ck.moco_arcl_loss(a, views, c),
    ck.moco_loss(a, b, c),
    ck.nnclr_loss(a, b, c),
    ck.nt_xent_loss(views, polarization=ck.Polarization(0.1, 0.5, 0.3)),
    ck.quick_thoughts_loss(a, b, context_size=2),
    ck.siglip_loss(a, b, 10.0, -10.0),
    ck.simsiam_loss(a, b, c, b),
    ck.spectral_contrastive_loss(a, b, method="gram"),
    ck.sup_con_loss(views, labels, positives="in"),
    ck.t_simclr_loss(a, b),
    ck.triplet_margin_loss(a, b, mining="hardest"),
    ck.uniformity_loss(a, t=1.0),
    ck.vicreg_loss(a, b, eps=1e-3),
    ck.info_nce_loss(a, b, c, logit_scale=10.0, label_smoothing=0.1, in_batch_negatives=True, backend="torch"),
    ck.nt_xent_loss(a, b, ids=labels, cutoff=torch.zeros(8), multi_view="pairs"),
]
