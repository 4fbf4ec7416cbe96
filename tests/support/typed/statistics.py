"""With ``return_stats`` a loss is a tensor and its statistics; a plain bool leaves both possible."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

import contrastive_kernels as ck

a, b, c = (normalize(torch.randn(8, 4), dim=1).requires_grad_() for _ in range(3))
views = normalize(torch.randn(8, 3, 4), dim=2).requires_grad_()

loss, stats = ck.nt_xent_loss(a, b, return_stats=True)
loss.backward()
accuracy: float = stats.accuracy.item()
largest: Tensor = stats.logit_max
ck.nt_xent_loss(a, b, return_stats=False).backward()

pairs: list[tuple[Tensor, ck.ContrastiveStats]] = [
    ck.arcl_loss(views, return_stats=True),
    ck.clip_loss(a, b, 10.0, return_stats=True),
    ck.debiased_loss(a, b, return_stats=True),
    ck.decoupled_loss(a, b, return_stats=True),
    ck.easy_negative_loss(a, b, k=3, return_stats=True),
    ck.false_negative_loss(a, b, return_stats=True),
    ck.hard_negative_loss(a, b, return_stats=True),
    ck.info_nce_loss(a, b, return_stats=True),
    ck.moco_arcl_loss(a, views, c, return_stats=True),
    ck.moco_loss(a, b, c, return_stats=True),
    ck.nnclr_loss(a, b, c, return_stats=True),
    ck.siglip_loss(a, b, 10.0, -10.0, return_stats=True),
    ck.sup_con_loss(views, return_stats=True),
]
mmcl: tuple[Tensor, ck.MMCLStats] = ck.mmcl_loss(a, b, return_stats=True)


def value(monitor: bool) -> Tensor:
    """Decide at run time."""
    found = ck.clip_loss(a, b, 10.0, return_stats=monitor)
    if isinstance(found, tuple):
        clip, statistics = found
        assert statistics.accuracy <= 1
        return clip
    found.backward()
    return found


value(True)
value(False)
