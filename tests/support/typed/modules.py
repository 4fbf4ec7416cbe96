"""Modules take the options of their functions by name, and are called like any other module."""

import torch
from torch import nn
from torch.nn.functional import normalize

import contrastive_kernels as ck

a, b = (normalize(torch.randn(8, 4), dim=1).requires_grad_() for _ in range(2))
views = normalize(torch.randn(8, 3, 4), dim=2).requires_grad_()
labels = torch.arange(8) % 3

ck.NTXentLoss(0.1)(a, b).backward()
criterion: nn.Module = ck.InfoNCELoss(temperature=0.1, symmetric=True, label_smoothing=0.1, reduction="sum")
criterion(a, b).backward()
scheduled = ck.HardNegativeLoss(0.1)
scheduled.beta, scheduled.reduction = 0.5, "sum"

modules = [
    ck.AlignmentLoss(normalize=True),
    ck.ArCLLoss(0.1, positive="mean"),
    ck.AugmentationRobustLoss(normalize=True),
    ck.BarlowTwinsLoss(lambd=0.01),
    ck.ClipLoss(),
    ck.DebiasedLoss(0.1, tau_plus=0.05),
    ck.DecoupledLoss(0.1),
    ck.DistancePolarization(lower=0.1, upper=0.5),
    ck.EasyNegativeLoss(0.1, k=3),
    ck.FalseNegativeLoss(0.1, threshold=0.5),
    ck.HardNegativeLoss(0.1, beta=0.5),
    ck.InfoNCELoss(0.1),
    ck.LMCLLoss("info_nce"),
    ck.LabelPullLoss(form="softmax"),
    ck.MMCLLoss(sigma=10.0),
    ck.MoCoArCLLoss(4, 16, 0.1),
    ck.MoCoLoss(4, 16, 0.1),
    ck.NNCLRLoss(4, 16, 0.1),
    ck.NTXentLoss(0.1, normalize=False, reduction="none", backend="torch"),
    ck.QuickThoughtsLoss(context_size=2),
    ck.SigLipLoss(),
    ck.SpectralContrastiveLoss(mu=2.0),
    ck.SupConLoss(0.1, positives="in"),
    ck.TSimCLRLoss(df=3.0),
    ck.TripletMarginLoss(margin=0.1),
    ck.SimSiamLoss(),
    ck.BYOLLoss(reduction="sum"),
    ck.UniformityLoss(t=1.0),
    ck.VICRegLoss(var_weight=10.0),
]
nn.ModuleList(modules).to("cpu").train()


class Model(nn.Module):
    """A loss as an attribute of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.loss = ck.SupConLoss(0.1)

    def forward(self, views: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.loss(self.encoder(views), labels)
        return loss


Model()(views, labels).backward()
