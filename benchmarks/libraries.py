"""The losses of training libraries as providers, each through its documented call, on any device.

None of them comes with this package. Their losses are loaded here without what they do not use of the libraries' own
dependencies.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from contrastive_kernels.compat.check.command import Library

from .eager import MARGIN, TEMPERATURE


class _StandIns(MetaPathFinder, Loader):
    """Imports of packages that are not installed give mocks."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return a specification for a module of one of the packages."""
        if fullname.partition(".")[0] in self.packages:
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return a module whose attributes are mocks."""
        module = ModuleType(spec.name)
        module.__dict__["__getattr__"] = lambda name: _mock(spec.name, name)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def _mock(module: str, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return MagicMock(name=f"{module}.{name}")


@contextmanager
def stand_ins(*packages: str) -> Iterator[None]:
    """Import other packages without some that their losses do not use, where these are not installed.

    lightly and open_clip ask for torchvision, whose builds fit one build of torch alone.
    """
    wanted = packages or ("torchvision",)
    finder = _StandIns([name for name in wanted if importlib.util.find_spec(name) is None])
    if finder.packages and importlib.util.find_spec("transformers") is not None:
        # asks once what is installed, and would take stand-ins for it
        utils = importlib.import_module("transformers.utils")
        for package in finder.packages:
            getattr(utils, f"is_{package}_available", bool)()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in finder.packages]:
            del sys.modules[name]


# What the losses of a library do not use of what it imports.
STAND_INS = {
    "lightly": ("torchvision",),
    "open_clip": ("torchvision",),
    "solo": ("einops", "pl_bolts", "timm", "torchvision"),
}
# Packages whose own imports take what is not installed, and the module whose names they lend to the losses.
UNINITIALISED = {
    "stable_pretraining": {
        "stable_pretraining": "",
        "stable_pretraining.backbone": "",
        "stable_pretraining.data": "",
        "stable_pretraining.utils": "stable_pretraining.utils.distributed",
    }
}


@contextmanager
def importable(name: str) -> Iterator[None]:
    """Let a library be imported without what its losses do not use."""
    for package, lender in UNINITIALISED.get(name, {}).items():
        if package not in sys.modules:
            spec = importlib.util.find_spec(package)
            if spec is None:
                break
            sys.modules[package] = importlib.util.module_from_spec(spec)
            if lender:
                vars(sys.modules[package]).update(vars(importlib.import_module(lender)))
    with stand_ins(*STAND_INS[name]) if name in STAND_INS else nullcontext():
        yield


def adapter_and_original(name: str) -> tuple[Any, Any]:
    """Return the adapter and the library that it stands in for."""
    with importable(name):
        return Library(name).modules()


@cache
def lightly() -> ModuleType:
    """Return lightly.loss."""
    with stand_ins():
        importlib.import_module("lightly.loss.hypersphere_loss")
        return importlib.import_module("lightly.loss")


@cache
def open_clip() -> ModuleType:
    """Return the module of open_clip's losses."""
    with stand_ins():
        return importlib.import_module("open_clip.loss")


@cache
def metric_learning(part: str = "losses") -> ModuleType:
    """Return a module of pytorch-metric-learning."""
    return importlib.import_module(f"pytorch_metric_learning.{part}")


class Rows(nn.Module):
    """A sentence encoder whose sentences are their embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = MagicMock(spec=importlib.import_module("transformers").PreTrainedTokenizerBase)
        self.max_seq_length = 1

    def __getitem__(self, index: int) -> Rows:
        """Return the only module."""
        return self

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the rows as embeddings."""
        return {"sentence_embedding": features["rows"]}


@cache
def sentence_transformers(name: str, **options: Any) -> nn.Module:
    """Return a loss of sentence-transformers over rows in place of sentences; see `sentences`."""
    losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")
    loss: nn.Module = getattr(losses, name)(Rows(), **options)
    return loss


def sentences(*columns: Tensor) -> list[dict[str, Tensor]]:
    """Return columns of rows as the sentences that a loss of sentence-transformers takes."""
    return [{"rows": column} for column in columns]


def open_clip_clip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    return open_clip().ClipLoss()(image_features, text_features, logit_scale)


def open_clip_siglip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    return open_clip().SigLipLoss()(image_features, text_features, logit_scale, logit_bias)


def lightly_nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
    return lightly().NTXentLoss(temperature=TEMPERATURE)(z0, z1)


def lightly_decoupled(z0: Tensor, z1: Tensor) -> Tensor:
    return lightly().DCLLoss(temperature=TEMPERATURE)(z0, z1)


def lightly_moco(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    loss = lightly().NTXentLoss(temperature=TEMPERATURE, memory_bank_size=(1, queue.shape[1]))
    # the rows of the queue have unit norm, as the bank keeps them; every step has the same queue
    loss.memory_bank.bank = queue
    loss.memory_bank._dequeue_and_enqueue = lambda batch: None
    return loss(query, key)


def lightly_barlow_twins(z0: Tensor, z1: Tensor) -> Tensor:
    return lightly().BarlowTwinsLoss(lambda_param=0.0051)(z0, z1)


def lightly_vicreg(z0: Tensor, z1: Tensor) -> Tensor:
    return lightly().VICRegLoss()(z0, z1)


def metric_learning_nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
    losses = metric_learning()
    return losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=TEMPERATURE))(z0, z1)


def metric_learning_info_nce(query: Tensor, positive_key: Tensor) -> Tensor:
    losses = metric_learning()
    return losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=TEMPERATURE), symmetric=False)(query, positive_key)


def metric_learning_sup_con(features: Tensor, labels: Tensor) -> Tensor:
    rows = features.transpose(0, 1).flatten(0, 1)
    return metric_learning().SupConLoss(temperature=TEMPERATURE)(rows, labels.repeat(features.shape[1]))


def metric_learning_triplet_margin(anchor: Tensor, positive: Tensor) -> Tensor:
    losses = metric_learning()
    loss = losses.TripletMarginLoss(
        margin=MARGIN,
        distance=metric_learning("distances").CosineSimilarity(),
        reducer=metric_learning("reducers").MeanReducer(),
    )
    return losses.SelfSupervisedLoss(loss, symmetric=False)(anchor, positive)


def sentence_transformers_info_nce(query: Tensor, positive_key: Tensor) -> Tensor:
    loss = sentence_transformers("MultipleNegativesRankingLoss", scale=1 / TEMPERATURE)
    return loss(sentences(query, positive_key), None)


class _ByBackward(torch.autograd.Function):
    """A loss whose gradients only `Tensor.backward` gives, because a hook on its value fills ``grad``."""

    @staticmethod
    def forward(ctx: Any, loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return the loss of copies of the inputs."""
        ctx.leaves = [value.detach().requires_grad_(value.requires_grad) for value in inputs]
        with torch.enable_grad():
            ctx.value = loss(*ctx.leaves)
        return ctx.value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that the copies got."""
        ctx.value.backward(grad)
        return None, *(leaf.grad for leaf in ctx.leaves)


def by_backward(loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return a loss whose gradients only `Tensor.backward` gives, as one that any way gives."""
    value: Tensor = _ByBackward.apply(loss, *inputs)
    return value


def cached_info_nce(query: Tensor, positive_key: Tensor) -> Tensor:
    # the scores are taken by mini-batches of rows too
    loss = sentence_transformers("CachedMultipleNegativesRankingLoss", scale=1 / TEMPERATURE, mini_batch_size=256)
    return by_backward(lambda *columns: loss(sentences(*columns), None), query, positive_key)


def info_nce_pytorch(query: Tensor, positive_key: Tensor) -> Tensor:
    return importlib.import_module("info_nce").InfoNCE(TEMPERATURE)(query, positive_key)
