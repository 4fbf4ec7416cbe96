"""Published losses over a group of processes, each through its documented call, and how to import them.

`make bench-distributed` installs the packages without their dependencies, as `make test-peers` does.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from torch import Tensor

from .eager import TEMPERATURE
from .peers import Peer


@cache
def lightly() -> ModuleType:
    """Return lightly.loss, which imports torchvision; the losses that we compare with do not use it."""
    stand_ins = {name: MagicMock() for name in ("torchvision", "torchvision.ops") if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        importlib.import_module("lightly.loss.hypersphere_loss")
        return importlib.import_module("lightly.loss")
    finally:
        for name in stand_ins:
            del sys.modules[name]


@cache
def open_clip() -> ModuleType:
    """Return the file of open_clip's losses, which only imports torch; the package imports torchvision and timm."""
    path = Path(importlib.util.find_spec("open_clip").origin).with_name("loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def sentence_transformers() -> ModuleType:
    """Return the losses of sentence-transformers."""
    return importlib.import_module("sentence_transformers.sentence_transformer.losses")


class Rows(torch.nn.Module):
    """A sentence encoder whose sentences are their embeddings."""

    def __init__(self) -> None:
        super().__init__()
        transformers = importlib.import_module("transformers")
        self.tokenizer = MagicMock(spec=transformers.PreTrainedTokenizerBase)
        self.max_seq_length = 1

    def __getitem__(self, index: int) -> Rows:
        return self

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the rows."""
        return {"sentence_embedding": features["rows"]}


@cache
def ranking(**options: Any) -> torch.nn.Module:
    """Return MultipleNegativesRankingLoss of sentence-transformers for embeddings."""
    return sentence_transformers().MultipleNegativesRankingLoss(Rows(), **options)


def _clip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    loss = open_clip().ClipLoss(local_loss=True, gather_with_grad=True, **place)
    return loss(image_features, text_features, logit_scale)


def _siglip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    loss = open_clip().SigLipLoss(rank=dist.get_rank(), world_size=dist.get_world_size())
    return loss(image_features, text_features, logit_scale, logit_bias)


def _nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
    return lightly().NTXentLoss(TEMPERATURE, gather_distributed=True)(z0, z1)


def _info_nce(query: Tensor, positive_key: Tensor) -> Tensor:
    loss = ranking(scale=1 / TEMPERATURE, gather_across_devices=True)
    return loss([{"rows": query}, {"rows": positive_key}], None)


PEERS = {
    "open_clip": Peer("open_clip", {"clip": _clip, "siglip": _siglip}),
    "lightly": Peer("lightly", {"nt_xent": _nt_xent}),
    "sentence-transformers": Peer("sentence_transformers", {"info_nce": _info_nce}),
}
# The distributions whose versions a row records.
DISTRIBUTIONS = {"open_clip": "open-clip-torch"}
