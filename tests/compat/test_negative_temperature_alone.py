"""The libraries take a negative temperature; the adapters have their values of it, though our losses refuse one."""

import pytest
import torch

from contrastive_kernels.compat import _small, info_nce, lightly, solo, stable_pretraining, supcontrast

LOSSES = {
    "info_nce": lambda x, y: info_nce.info_nce(x, y, temperature=-0.7),
    "info_nce-paired": lambda x, y: info_nce.info_nce(x, y, y[:, None], temperature=-0.7, negative_mode="paired"),
    "lightly-nt_xent": lambda x, y: lightly.NTXentLoss(-0.7)(x, y),
    "lightly-bank": lambda x, y: lightly.NTXentLoss(-0.7, memory_bank_size=(9, 4))(x, y),
    "lightly-dcl": lambda x, y: lightly.DCLLoss(-0.7)(x, y),
    "solo-simclr": lambda x, y: solo.simclr_loss_func(torch.cat([x, y]), torch.arange(12).repeat(2), -0.7),
    "solo-mocov2plus": lambda x, y: solo.mocov2plus_loss_func(x, y, y.T, -0.7),
    "solo-mocov3": lambda x, y: solo.mocov3_loss_func(x, y, -0.7),
    "solo-nnclr": lambda x, y: solo.nnclr_loss_func(x, y, -0.7),
    "stable-nt_xent": lambda x, y: stable_pretraining.NTXEntLoss(-0.7)(x, y),
    "stable-clip": lambda x, y: stable_pretraining.CLIPLoss(-0.7)(x, y),
    "stable-info_nce": lambda x, y: stable_pretraining.InfoNCELoss(-0.7)(x, y, torch.arange(12)),
    "supcontrast": lambda x, y: supcontrast.SupConLoss(-0.7)(torch.stack([x, y], 1)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_sweep_gives_what_the_formula_gives(name):
    values = []
    for largest in (0, _small._largest):
        torch.manual_seed(0)
        x, y = (torch.randn(12, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        with _small.largest(largest):
            loss = LOSSES[name](x, y)
        values.append((loss, *torch.autograd.grad(loss, (x, y), allow_unused=True)))
    torch.testing.assert_close(values[0], values[1], rtol=1e-10, atol=1e-12)
