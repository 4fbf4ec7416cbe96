"""What is compared: for every loss its inputs, plain PyTorch as a user would write it, and what else computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import contrastive_kernels as ck

Inputs = dict[str, Tensor]
LossFunction = Callable[..., Tensor]

TEMPERATURE = 0.1
QUEUE = 65536
VIEWS = 4
# MoCo's inputs from its momentum encoder, which gets no gradient.
MOMENTUM = ("key", "keys", "queue")
BAND = ck.Polarization(lower=0.1, upper=0.5, weight=0.1)


class Unavailable(Exception):
    """A provider cannot run here or does not compute this loss; the message says why."""


@dataclass(frozen=True)
class Loss:
    """One loss to compare. ``n`` counts the rows of the similarity matrix (for NT-Xent both views together).

    ``products`` counts the matrix products that the loss and its gradients need when the similarities are not stored,
    forward and backward, in units of 2·N·M·D FLOP. The same count serves every provider, so that work a provider
    repeats does not look like speed.
    """

    inputs: Callable[[int, int], Inputs]
    eager: LossFunction
    ours: LossFunction
    products: tuple[float, float]
    columns: Callable[[int], int] = lambda n: n
    others: Mapping[str, LossFunction] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A loss at one size, in one dtype."""

    loss: str
    n: int
    d: int
    dtype: torch.dtype

    @property
    def m(self) -> int:
        """Columns of the similarity matrix."""
        return LOSSES[self.loss].columns(self.n)

    @property
    def pairs(self) -> int:
        return self.n * self.m

    def flop(self, mode: str) -> float:
        """FLOP of the products that this loss needs, for ``"fwd"``, ``"bwd"`` or ``"both"``."""
        forward, backward = LOSSES[self.loss].products
        return 2.0 * self.pairs * self.d * {"fwd": forward, "bwd": backward, "both": forward + backward}[mode]

    def inputs(self, device: torch.device) -> Inputs:
        """Inputs from a fixed seed, drawn on the CPU so that every device gets the same."""
        torch.manual_seed(0)
        inputs = {}
        for name, value in LOSSES[self.loss].inputs(self.n, self.d).items():
            # Learnable scalars stay float32 in mixed-precision training.
            dtype = self.dtype if value.ndim else torch.promote_types(self.dtype, torch.float32)
            inputs[name] = value.to(device, dtype).requires_grad_(name not in MOMENTUM)
        return inputs

    def __str__(self) -> str:
        return f"{self.loss} {self.n:,}×{self.m:,} D={self.d} {dtype_name(self.dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


# Inputs. Two views are one row disturbed twice (cosine about 0.7), as in the middle of training.


def _rows(n: int, d: int) -> Tensor:
    return F.normalize(torch.randn(n, d), dim=-1)


def _views(n: int, d: int, views: int) -> Tensor:
    return F.normalize(_rows(n, d)[:, None] + F.normalize(torch.randn(n, views, d), dim=-1) * 0.65, dim=-1)


def _pair(first: str, second: str, n: int, d: int) -> Inputs:
    return dict(zip((first, second), _views(n, d, 2).unbind(1), strict=True))


def _two_views(n: int, d: int) -> Inputs:
    return _pair("z0", "z1", n // 2, d)


def _query_key(n: int, d: int) -> Inputs:
    return _pair("query", "positive_key", n, d)


def _clip_inputs(n: int, d: int) -> Inputs:
    return _pair("image_features", "text_features", n, d) | {"logit_scale": torch.tensor(1 / 0.07)}


def _moco_inputs(n: int, d: int) -> Inputs:
    return _pair("query", "key", n, d) | {"queue": _rows(QUEUE, d)}


def _moco_arcl_inputs(n: int, d: int) -> Inputs:
    query, *keys = _views(n, d, 1 + VIEWS).unbind(1)
    return {"query": query, "keys": torch.stack(keys, 1), "queue": _rows(QUEUE, d)}


# The losses as people write them.


def clip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """The loss of OpenAI's and Hugging Face's CLIP: one product, cross entropy over its rows and columns."""
    logits = logit_scale * image_features @ text_features.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def info_nce(query: Tensor, positive_key: Tensor) -> Tensor:
    """InfoNCE with in-batch negatives."""
    logits = F.normalize(query, dim=-1) @ F.normalize(positive_key, dim=-1).T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def _self_similarity(z0: Tensor, z1: Tensor) -> Tensor:
    z = F.normalize(torch.cat([z0, z1]), dim=-1)
    return z @ z.T


def _nt_xent_of(similarity: Tensor) -> Tensor:
    n = len(similarity)
    logits = (similarity / TEMPERATURE).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.arange(n, device=logits.device).roll(n // 2))


def nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
    """SimCLR's loss."""
    return _nt_xent_of(_self_similarity(z0, z1))


def _band(similarity: Tensor) -> Tensor:
    distance = (1 - similarity) / 2
    return F.relu((distance - BAND.lower) * (BAND.upper - distance))


def nt_xent_polarized(z0: Tensor, z1: Tensor) -> Tensor:
    """NT-Xent plus the distance polarization of its negatives."""
    similarity = _self_similarity(z0, z1)
    rows = torch.arange(len(similarity), device=similarity.device) % len(z0)
    band = _band(similarity).masked_fill(rows[:, None] == rows, 0.0)
    return _nt_xent_of(similarity) + BAND.weight * band.sum() / (len(rows) * (len(rows) - 2))


def distance_polarization(z: Tensor) -> Tensor:
    """The polarization regulariser alone; a row's distance to itself is 0, outside the band."""
    z = F.normalize(z, dim=-1)
    return _band(z @ z.T).sum() / (len(z) * (len(z) - 1))


def moco(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """MoCo: the positive beside a queue of past keys."""
    query, key, queue = F.normalize(query, dim=-1), F.normalize(key, dim=-1), F.normalize(queue, dim=-1)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / TEMPERATURE
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def arcl(views: Tensor) -> Tensor:
    """ArCL on SimCLR: the least similar pair of views is the positive, both first views are in the denominator."""
    views = F.normalize(views, dim=-1)
    first, second = torch.triu_indices(views.shape[1], views.shape[1], 1, device=views.device)
    positive = (views @ views.mT)[:, first, second].min(1).values / TEMPERATURE
    anchor = views[:, 0]
    own = (anchor @ anchor.T).fill_diagonal_(float("-inf"))
    logits = torch.cat([own, anchor @ views[:, 1].T], 1) / TEMPERATURE
    return (logits.logsumexp(1) - positive).mean()


def moco_arcl(query: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
    """ArCL on MoCo: the least similar key view is the positive."""
    query, keys, queue = F.normalize(query, dim=-1), F.normalize(keys, dim=-1), F.normalize(queue, dim=-1)
    positive = (keys @ query[:, :, None]).squeeze(-1).min(1, keepdim=True).values
    logits = torch.cat([positive, query @ queue.T], 1) / TEMPERATURE
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


# torch >= 2.13: cross entropy of a linear layer in chunks. It is InfoNCE where the keys are the weight.


def _linear_cross_entropy(query: Tensor, key: Tensor) -> Tensor:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"needs torch 2.13, this is {torch.__version__}")
    target = torch.arange(len(query), device=query.device)
    return F.linear_cross_entropy(query, key, target, options=torch.nn.LinearCrossEntropyOptions())


def info_nce_linear(query: Tensor, positive_key: Tensor) -> Tensor:
    """InfoNCE through ``F.linear_cross_entropy``."""
    return _linear_cross_entropy(F.normalize(query, dim=-1) / TEMPERATURE, F.normalize(positive_key, dim=-1))


def clip_linear(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP as two calls of ``F.linear_cross_entropy``, one a direction."""
    rows = _linear_cross_entropy(logit_scale * image_features, text_features)
    return (rows + _linear_cross_entropy(logit_scale * text_features, image_features)) / 2


# Without stored similarities: the product S itself, once forward and once again backward, and one product a gradient.
# Self-similarity is symmetric: half of S, and a single gradient product. A queue and its keys get no gradient.
_TWO_GRADIENTS, _ONE_GRADIENT, _SYMMETRIC = (1, 3), (1, 2), (0.5, 1.5)


def _at_temperature(function: LossFunction) -> LossFunction:
    return partial(function, temperature=TEMPERATURE)


LOSSES: dict[str, Loss] = {
    "clip": Loss(_clip_inputs, clip, ck.clip_loss, _TWO_GRADIENTS, others={"linear_cross_entropy": clip_linear}),
    "nt_xent": Loss(_two_views, nt_xent, _at_temperature(ck.nt_xent_loss), _SYMMETRIC),
    "info_nce": Loss(
        _query_key,
        info_nce,
        _at_temperature(ck.info_nce_loss),
        _TWO_GRADIENTS,
        others={"linear_cross_entropy": info_nce_linear},
    ),
    "moco": Loss(_moco_inputs, moco, _at_temperature(ck.moco_loss), _ONE_GRADIENT, columns=lambda n: QUEUE),
    "arcl": Loss(
        lambda n, d: {"views": _views(n, d, VIEWS)},
        arcl,
        _at_temperature(ck.arcl_loss),
        _TWO_GRADIENTS,
        columns=lambda n: 2 * n,
    ),
    "moco_arcl": Loss(
        _moco_arcl_inputs, moco_arcl, _at_temperature(ck.moco_arcl_loss), _ONE_GRADIENT, columns=lambda n: QUEUE
    ),
    "nt_xent_polarized": Loss(
        _two_views, nt_xent_polarized, _at_temperature(partial(ck.nt_xent_loss, polarization=BAND)), _SYMMETRIC
    ),
    "distance_polarization": Loss(
        lambda n, d: {"z": _rows(n, d)},
        distance_polarization,
        partial(ck.distance_polarization, lower=BAND.lower, upper=BAND.upper),
        _SYMMETRIC,
    ),
}
CORE = ("clip", "nt_xent", "info_nce")

# Providers that hold N × M matrices, and about how many at their peak.
DENSE, DENSE_COPIES = ("eager", "autocast", "compile"), 4
PROVIDERS = ("ours", "ours-torch", *DENSE, "linear_cross_entropy")


def provider_function(provider: str, case: Case, device: torch.device) -> LossFunction:
    """The callable that computes ``case`` the way of ``provider``; raises `Unavailable` with the reason."""
    loss = LOSSES[case.loss]
    if provider == "ours":
        return loss.ours
    if provider == "ours-torch":
        return partial(loss.ours, backend="torch")
    if provider == "eager":
        return loss.eager
    if provider == "compile":
        # One program a size, as for the fixed batch of a training run. Dynamo gives up after a few without the reset.
        torch.compiler.reset()
        return torch.compile(loss.eager, dynamic=False)
    if provider == "autocast":
        if case.dtype not in (torch.bfloat16, torch.float16):
            raise Unavailable("autocast is for bfloat16 and float16")
        return torch.autocast(device.type, case.dtype)(loss.eager)
    if provider in loss.others:
        return loss.others[provider]
    raise Unavailable("does not compute this loss")


# How far off a provider may be at the size of the check: three times as far as eager in the same dtype, plus this. It
# tells a wrong formula from rounding; how accurate the losses are is what the tests are for.
_FLOOR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_CHECK_ROWS = 192


def check(provider: str, case: Case, device: torch.device) -> None:
    """Raise `Unavailable` unless value and gradients agree with plain PyTorch in float64 at a small size."""
    if objections := _objections(provider, replace(case, n=_CHECK_ROWS), device):
        raise Unavailable(f"differs from float64: {objections}")


@cache
def _objections(provider: str, case: Case, device: torch.device) -> str:
    allowed = _errors("eager", case, device)
    errors = _errors(provider, case, device).items()
    wrong = [(name, error) for name, error in errors if not error <= 3 * allowed[name] + _FLOOR[case.dtype]]
    return ", ".join(f"{name} by {error:.0e}" for name, error in wrong)


def _errors(provider: str, case: Case, device: torch.device) -> dict[str, float]:
    """Relative error (of a gradient the RMS) of the value and every gradient."""
    inputs = case.inputs(device)
    exact_inputs = {name: value.detach().double().requires_grad_(value.requires_grad) for name, value in inputs.items()}
    exact = _value_and_gradients(LOSSES[case.loss].eager, exact_inputs)
    found = _value_and_gradients(provider_function(provider, case, device), inputs)
    return {name: ((found[name].double() - exact[name]).norm() / exact[name].norm()).item() for name in exact}


def _value_and_gradients(function: LossFunction, inputs: Inputs) -> Inputs:
    value = function(**inputs)
    return {"value": value.detach()} | {f"gradient of {name}": g for name, g in gradients(value, inputs).items()}


def gradients(loss: Tensor, inputs: Inputs) -> Inputs:
    """Gradients of ``loss`` with respect to the inputs that want one, by name."""
    leaves = {name: value for name, value in inputs.items() if value.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
