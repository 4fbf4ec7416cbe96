"""open_clip's losses beside ours: what their tests share."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F

from benchmarks import libraries
from tests.support import adapters

adapters.require_peers()

ours, theirs = adapters.modules("open_clip")
with libraries.stand_ins():
    open_clip = importlib.import_module("open_clip")

CLASSES = ("ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss")


def made(module, name, **options):
    """Return a loss; CoCa's weights have no defaults."""
    weights = {"caption_loss_weight": 2.0, "clip_loss_weight": 1.0} if name == "CoCaLoss" else {}
    return getattr(module, name)(**weights, **options)


def inputs(name, n=9, dtype=torch.float64, d=6):
    """Return what a model gives for a loss, by the names that a trainer uses; the teacher has no gradient."""
    generator = torch.Generator().manual_seed(n)

    def unit(width=d):
        return F.normalize(torch.randn(n, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)

    found = {"image_features": unit().requires_grad_(), "text_features": unit().requires_grad_()}
    found["logit_scale"] = torch.tensor(7.0, dtype=dtype, requires_grad=True)
    if name == "SigLipLoss":
        found["logit_bias"] = torch.tensor(-3.0, dtype=dtype, requires_grad=True)
    if name == "CoCaLoss":
        found["logits"] = torch.randn(n, 4, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        found["labels"] = torch.randint(5, (n, 4), generator=generator)
    if name == "DistillClipLoss":
        found |= {"dist_image_features": unit(3), "dist_text_features": unit(3), "dist_logit_scale": torch.tensor(11.0)}
    return found


def result(loss, given, **options):
    """Return value and gradients of a loss."""
    found = loss(**given, output_dict=True, **options)
    assert all(type(value) is torch.Tensor for value in found.values())
    leaves = {name: x for name, x in given.items() if getattr(x, "requires_grad", False)}
    total = sum((i + 1) * value for i, value in enumerate(found.values()))
    grads = torch.autograd.grad(total, list(leaves.values()))
    found = {key: value.detach() for key, value in found.items()}
    return {**found, **{f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}}
