"""How many kernels a training step of a loss launches: the time of a small batch on a GPU is that of its launches.

The interpreter counts launches of Triton kernels, and operators of PyTorch that do more than describe memory.
"""

import collections
import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import contrastive_kernels as ck
from contrastive_kernels.engine import operators
from contrastive_kernels.engine.backends import triton as triton_backend

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETING, reason="no TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning"),
]

# Operators that launch nothing; every other one is counted as one launch, as on a GPU.
DESCRIBE = {
    *(
        "view",
        "expand",
        "permute",
        "transpose",
        "t",
        "unsqueeze",
        "squeeze",
        "select",
        "slice",
        "unbind",
        "split",
        "flatten",
    ),
    *("alias", "detach", "as_strided", "_unsafe_view", "empty", "new_empty", "empty_like", "empty_strided"),
}


class Launches(TorchDispatchMode):
    """Count launches: `kernels` of Triton, and operators by name."""

    def __init__(self):
        super().__init__()
        self.counts, self.kernels = collections.Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        if namespace == "contrastive_kernels":
            with self:  # count its launches
                name = name.removeprefix("triton_")
                return operators._kernel(name, triton_backend.operators[name])(*args, **(kwargs or {}))
        out = function(*args, **(kwargs or {}))
        empty = isinstance(out, torch.Tensor) and not out.numel()
        self.counts[name] += not (name in DESCRIBE or empty)
        return out

    @property
    def total(self) -> int:
        return self.kernels + sum(self.counts.values())


@pytest.fixture
def launches(monkeypatch):
    from triton.runtime import interpreter

    mode, run = Launches(), interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        mode.kernels += 1
        with torch.utils._python_dispatch._disable_current_modes():
            return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)

    def count(step, leaves) -> Launches:
        step()  # what is done once
        for leaf in leaves:
            leaf.grad = None  # as optimizers do, before every step
        mode.counts.clear()
        mode.kernels = 0
        with mode:
            step()
        return mode

    return count


def dense_clip(x, y, scale):
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    logits, target = scale * x @ y.T, torch.arange(len(x))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def dense_info_nce(x, y, scale):
    return F.cross_entropy(scale * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T, torch.arange(len(x)))


def dense_nt_xent(x, y, scale):
    z = F.normalize(torch.cat([x, y]), dim=1)
    logits = (scale * z @ z.T).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(x)))


def dense_siglip(x, y, scale):
    logits = scale * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T - 1
    return -F.logsigmoid((2 * torch.eye(len(x)) - 1) * logits).sum() / len(x)


# The most launches that a forward and backward take: every small batch pays for them.
CASES = {
    "clip": (28, lambda x, y, scale: ck.clip_loss(x, y, scale, backend="triton"), dense_clip),
    "clip-normalize": (32, lambda x, y, scale: ck.clip_loss(x, y, scale, normalize=True, backend="triton"), dense_clip),
    "info_nce": (27, lambda x, y, scale: ck.info_nce_loss(x, y, logit_scale=scale, backend="triton"), dense_info_nce),
    "siglip": (
        37,
        lambda x, y, scale: ck.siglip_loss(x, y, scale, -1.0, normalize=True, backend="triton"),
        dense_siglip,
    ),
    "nt_xent": (30, lambda x, y, scale: ck.nt_xent_loss(x, y, logit_scale=scale, backend="triton"), dense_nt_xent),
}


@pytest.mark.parametrize("name", CASES)
def test_launches(name, launches):
    """A forward and backward take no more launches than recorded, nor than plain PyTorch."""
    most, loss, dense = CASES[name]
    x, y = torch.randn(2, 64, 32).unbind(0)
    x, y, scale = x.requires_grad_(), y.requires_grad_(), torch.tensor(10.0, requires_grad=True)
    eager = launches(lambda: dense(x, y, scale).backward(), (x, y, scale)).total
    ours = launches(lambda: loss(x, y, scale).backward(), (x, y, scale))
    assert ours.total <= most, f"{ours.total} launches, {most} before: {ours.kernels} of Triton, {dict(ours.counts)}"
    assert ours.kernels > 5, "the interpreter's launches are not seen"
    assert ours.total <= eager, f"{ours.total} launches, {eager} in plain PyTorch"
