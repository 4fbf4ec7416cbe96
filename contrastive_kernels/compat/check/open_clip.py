"""The cases of open_clip."""

from __future__ import annotations

import importlib
from argparse import Namespace
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from contrastive_kernels.compat.check.case import Case, Draw

DISTRIBUTION = "open-clip-torch"
OPTIONS = {"local_loss": False, "gather_with_grad": False, "rank": 0, "world_size": 1, "horovod": False}


def peer() -> ModuleType:
    """Return the module whose names the adapter has."""
    return importlib.import_module("open_clip.loss")


def _pair(draw: Draw) -> tuple[Tensor, Tensor]:
    image, text = (F.normalize(draw.rows(draw.n, 5), dim=1) for _ in range(2))
    return image, text


def _clip(module: Any, draw: Draw) -> Any:
    image, text = _pair(draw)
    return module.ClipLoss()(
        image_features=image, text_features=text, logit_scale=draw.leaf(3.0).exp(), output_dict=True
    )


def _clip_bias(module: Any, draw: Draw) -> Any:
    # neither normalised, nor a scalar
    return module.ClipLoss(cache_labels=True)(
        draw.rows(draw.n, 5), draw.rows(draw.n, 5), draw.rows(1), logit_bias=draw.leaf(-2.0)
    )


def _clip_local(module: Any, draw: Draw) -> Any:
    """In one process the options of several have no effect."""
    return module.ClipLoss(True, True)(*_pair(draw), 14.3)


def _coca(weight: float) -> Any:
    def run(module: Any, draw: Draw) -> Any:
        loss = module.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=weight, pad_id=1)
        logits, labels = draw.rows(draw.n, 4, 7), draw.integers(7, draw.n, 4)
        return loss(*_pair(draw), logits, labels, draw.leaf(5.0), output_dict=True)

    return run


def _distill(grad: bool) -> Any:
    def run(module: Any, draw: Draw) -> Any:
        teacher = [F.normalize(draw.rows(draw.n, 3, grad=grad), dim=1) for _ in range(2)]
        return module.DistillClipLoss()(*_pair(draw), draw.leaf(5.0), *teacher, draw.leaf(8.0, grad), output_dict=True)

    return run


def _siglip(bias: bool) -> Any:
    def run(module: Any, draw: Draw) -> Any:
        image, text = _pair(draw)
        return module.SigLipLoss()(image, text, draw.leaf(9.0), draw.leaf(-4.0) if bias else None, output_dict=True)

    return run


def _created(**options: Any) -> Any:
    def run(module: Any, draw: Draw) -> Any:
        # the trainer's factory makes what the module has; the peer's module of losses does not have it
        create = getattr(module, "create_loss", importlib.import_module("open_clip").create_loss)
        loss = create(Namespace(**{"model": "ViT-B-32", "distill": False, "siglip": False, **OPTIONS, **options}))
        inputs: dict[str, Any] = dict(zip(("image_features", "text_features"), _pair(draw), strict=True))
        if options.get("siglip"):
            inputs["logit_bias"] = draw.leaf(-3.0)
        return loss(**inputs, logit_scale=draw.leaf(4.0), output_dict=True)

    return run


CASES = (
    Case("ClipLoss", "", _clip),
    Case("ClipLoss", "logit_bias, a scale of one element", _clip_bias),
    Case("ClipLoss", "options of several ranks in one process", _clip_local),
    Case("CoCaLoss", "", _coca(1.5)),
    Case("CoCaLoss", "clip_loss_weight=0", _coca(0.0)),
    Case("DistillClipLoss", "", _distill(False)),
    Case("DistillClipLoss", "teacher with gradient", _distill(True)),
    Case("SigLipLoss", "", _siglip(True)),
    Case("SigLipLoss", "logit_bias=None", _siglip(False)),
    Case("create_loss", "CLIP", _created()),
    Case("create_loss", "SigLIP", _created(siglip=True, loss_dist_impl=None)),
)
