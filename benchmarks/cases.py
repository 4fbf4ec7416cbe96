"""The losses to compare: inputs, plain PyTorch form, our function, other providers; and the check of a provider."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import contrastive_kernels as ck

from . import eager, peers
from .eager import BAND, BETA, CLASSES, EASIEST, LABELS, MARGIN, MMCL, TAU_PLUS, TEMPERATURE, TOP_K, WARM, Unavailable

Inputs = dict[str, Tensor]
LossFunction = Callable[..., Tensor]

QUEUE = 65536
VIEWS = 4


@dataclass(frozen=True)
class Loss:
    """A loss to compare. N is the number of rows of its similarity matrix, for two views of one batch both together.

    Attributes:
        inputs: makes the inputs from N and D.
        eager: the loss in plain PyTorch.
        ours: the loss of this package.
        products: how many matrix products forward and backward need without stored similarities, in units of 2·N·M·D
            FLOP. All providers share this count, so repeated work does not look like speed.
        columns: the number M of columns of the similarity matrix.
        others: further functions that compute this loss, by provider.
        detached: inputs without gradient.
        sizes: the N measured by default.
        elements: how many elements the largest tensor of the eager form has, 0 if there is none beyond the inputs.
    """

    inputs: Callable[[int, int], Inputs]
    eager: LossFunction
    ours: LossFunction
    products: tuple[float, float]
    columns: Callable[[int], int] = lambda n: n
    others: Mapping[str, LossFunction] = field(default_factory=dict)
    detached: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1024, 2048, 4096, 8192)
    elements: Callable[[int, int], int] = lambda n, m: n * m


@dataclass(frozen=True)
class Case:
    """A loss at one size, in one dtype."""

    loss: str
    n: int
    d: int
    dtype: torch.dtype

    @property
    def m(self) -> int:
        """Number of columns of the similarity matrix."""
        return LOSSES[self.loss].columns(self.n)

    @property
    def pairs(self) -> int:
        """Number of entries of the similarity matrix."""
        return self.n * self.m

    @property
    def elements(self) -> int:
        """Number of elements of the largest tensor of the eager form."""
        return LOSSES[self.loss].elements(self.n, self.m)

    def dense_gib(self, provider: str) -> float:
        """Return the estimated memory of a provider that holds N × M matrices, 0 for the others."""
        if provider in peers.PEERS:
            matrices = peers.PEERS[provider].matrices(self.loss, self.n)
        else:
            matrices = DENSE_COPIES if provider in DENSE else 0
        return matrices * self.elements * self.dtype.itemsize / 2**30

    def refusal(self) -> str:
        """Return why the loss has no such case; empty if it has."""
        if self.n < 2 or self.d < 1:
            return f"N = {self.n:,}, D = {self.d:,}: a loss needs two rows of a feature"
        if self.n % 2 and LOSSES[self.loss].inputs in (_two_views, _labelled):
            return f"N = {self.n:,} is odd, and counts the rows of two views"
        return ""

    def flop(self, mode: str) -> float:
        """Return the FLOP of the products that the loss needs in mode ``"fwd"``, ``"bwd"`` or ``"both"``."""
        forward, backward = LOSSES[self.loss].products
        return 2.0 * self.pairs * self.d * {"fwd": forward, "bwd": backward, "both": forward + backward}[mode]

    def inputs(self, device: torch.device) -> Inputs:
        """Return inputs from a fixed seed, drawn on the CPU so that every device gets the same."""
        torch.manual_seed(0)
        inputs = {}
        for name, value in LOSSES[self.loss].inputs(self.n, self.d).items():
            if not value.is_floating_point():
                inputs[name] = value.to(device)
                continue
            # Learnable scalars stay float32 in mixed-precision training.
            dtype = self.dtype if value.ndim else torch.promote_types(self.dtype, torch.float32)
            inputs[name] = value.to(device, dtype).requires_grad_(name not in LOSSES[self.loss].detached)
        return inputs

    def __str__(self) -> str:
        return f"{self.loss} {self.n:,}×{self.m:,} D={self.d} {dtype_name(self.dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


# Inputs. Two views are one row plus noise (cosine about 0.7), as in the middle of training.


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


def _siglip_inputs(n: int, d: int) -> Inputs:
    scalars = {"logit_scale": torch.tensor(10.0), "logit_bias": torch.tensor(-10.0)}
    return _pair("image_features", "text_features", n, d) | scalars


def _two_towers(n: int, d: int) -> Inputs:
    return _pair("z0", "z1", n, d)


def _predictions(n: int, d: int) -> Inputs:
    return dict(zip(("p0", "z0", "p1", "z1"), _views(n, d, 4).unbind(1), strict=True))


def _labelled(n: int, d: int) -> Inputs:
    return {"features": _views(n // 2, d, 2), "labels": torch.arange(n // 2) % CLASSES}


def _moco_inputs(n: int, d: int) -> Inputs:
    return _pair("query", "key", n, d) | {"queue": _rows(QUEUE, d)}


def _moco_arcl_inputs(n: int, d: int) -> Inputs:
    query, *keys = _views(n, d, 1 + VIEWS).unbind(1)
    return {"query": query, "keys": torch.stack(keys, 1), "queue": _rows(QUEUE, d)}


def _nnclr_inputs(n: int, d: int) -> Inputs:
    return _pair("z", "predictions", n, d) | {"support": _rows(n, d)}


def _label_inputs(n: int, d: int) -> Inputs:
    return {"z": _rows(n, d), "labels": torch.arange(n) % LABELS, "label_embeddings": _rows(LABELS, d)}


def _multi_view(n: int, d: int) -> Inputs:
    return {"views": _views(n, d, VIEWS)}


# Products without stored similarities: S, one for each gradient, and S again in the backward where a pair has to wait
# for its row's and its column's statistics. A loss of rows alone or of pairs alone has value and gradients from one
# visit. A symmetric S needs half the product and has one gradient. A queue and its keys have none.
_BOTH_DIRECTIONS, _ONE_VISIT, _ONE_GRADIENT = (1, 3), (1, 2), (1, 1)
_SYMMETRIC, _SYMMETRIC_PAIRS = (0.5, 1.5), (0.5, 1)
# Products of size D x D only.
_NONE = (0, 0)


def _at_temperature(function: LossFunction) -> LossFunction:
    return partial(function, temperature=TEMPERATURE)


LOSSES: dict[str, Loss] = {
    "info_nce": Loss(
        _query_key,
        eager.info_nce,
        _at_temperature(ck.info_nce_loss),
        _ONE_VISIT,
        others={"linear_cross_entropy": eager.info_nce_by(eager.linear_cross_entropy)},
    ),
    "nt_xent": Loss(_two_views, eager.nt_xent, _at_temperature(ck.nt_xent_loss), _SYMMETRIC),
    "clip": Loss(
        _clip_inputs,
        eager.clip,
        ck.clip_loss,
        _BOTH_DIRECTIONS,
        others={"linear_cross_entropy": eager.clip_by(eager.linear_cross_entropy)},
    ),
    "siglip": Loss(_siglip_inputs, eager.siglip, ck.siglip_loss, _ONE_VISIT),
    "moco": Loss(
        _moco_inputs,
        eager.moco,
        _at_temperature(ck.moco_loss),
        _ONE_GRADIENT,
        columns=lambda n: QUEUE,
        detached=("key", "queue"),
    ),
    "sup_con": Loss(_labelled, eager.sup_con, _at_temperature(ck.sup_con_loss), _SYMMETRIC),
    "debiased": Loss(
        _two_views, eager.debiased, partial(ck.debiased_loss, temperature=WARM, tau_plus=TAU_PLUS), _SYMMETRIC
    ),
    "hard_negative": Loss(
        _two_views,
        eager.hard_negative,
        partial(ck.hard_negative_loss, temperature=WARM, tau_plus=TAU_PLUS, beta=BETA),
        _SYMMETRIC,
    ),
    "decoupled": Loss(_two_views, eager.decoupled, _at_temperature(ck.decoupled_loss), _SYMMETRIC),
    # A search for the nearest rows, then the loss, with a gradient for the predictions only.
    "nnclr": Loss(_nnclr_inputs, eager.nnclr, _at_temperature(ck.nnclr_loss), (2, 1), detached=("z", "support")),
    # A selection, then a loss over the kept pairs, which are no longer symmetric.
    "false_negative": Loss(
        _two_views,
        eager.false_negative,
        _at_temperature(partial(ck.false_negative_loss, threshold=None, top_k=TOP_K, factor=1.0)),
        (2, 2),
    ),
    "easy_negative": Loss(
        _query_key, eager.easy_negative, _at_temperature(partial(ck.easy_negative_loss, k=EASIEST)), (2, 2)
    ),
    "quick_thoughts": Loss(
        lambda n, d: _pair("first", "second", n, d), eager.quick_thoughts, ck.quick_thoughts_loss, _ONE_VISIT
    ),
    "arcl": Loss(
        _multi_view,
        eager.arcl,
        _at_temperature(ck.arcl_loss),
        _BOTH_DIRECTIONS,
        columns=lambda n: 2 * n,
    ),
    "moco_arcl": Loss(
        _moco_arcl_inputs,
        eager.moco_arcl,
        _at_temperature(ck.moco_arcl_loss),
        _ONE_GRADIENT,
        columns=lambda n: QUEUE,
        detached=("keys", "queue"),
    ),
    "distance_polarization": Loss(
        lambda n, d: {"z": _rows(n, d)},
        eager.distance_polarization,
        partial(ck.distance_polarization, lower=BAND.lower, upper=BAND.upper),
        _SYMMETRIC_PAIRS,
    ),
    "lmcl": Loss(_two_views, eager.lmcl, _at_temperature(partial(ck.nt_xent_loss, polarization=BAND)), _SYMMETRIC),
    "spectral_contrastive": Loss(_two_towers, eager.spectral_contrastive, ck.spectral_contrastive_loss, _NONE),
    "barlow_twins": Loss(_two_towers, eager.barlow_twins, ck.barlow_twins_loss, _NONE, elements=lambda n, m: 0),
    "vicreg": Loss(_two_towers, eager.vicreg, ck.vicreg_loss, _NONE, elements=lambda n, m: 0),
    # Products of rows, no matrix product.
    "simsiam": Loss(
        _predictions, eager.simsiam, ck.simsiam_loss, _NONE, detached=("z0", "z1"), elements=lambda n, m: 0
    ),
    "byol": Loss(_predictions, eager.byol, ck.byol_loss, _NONE, detached=("z0", "z1"), elements=lambda n, m: 0),
    # Distances of the V views of each sample: no matrix product.
    "alignment": Loss(_multi_view, eager.alignment, ck.alignment_loss, _NONE, columns=lambda n: VIEWS),
    "augmentation_robust": Loss(
        _multi_view, eager.augmentation_robust, ck.augmentation_robust_loss, _NONE, columns=lambda n: VIEWS
    ),
    "uniformity": Loss(lambda n, d: {"z": _rows(n, d)}, eager.uniformity, ck.uniformity_loss, _SYMMETRIC),
    "t_simclr": Loss(_two_views, eager.t_simclr, ck.t_simclr_loss, _SYMMETRIC),
    "triplet_margin": Loss(
        lambda n, d: _pair("anchor", "positive", n, d),
        eager.triplet_margin,
        partial(ck.triplet_margin_loss, margin=MARGIN),
        _ONE_VISIT,
    ),
    "label_pull": Loss(
        _label_inputs,
        eager.label_pull,
        _at_temperature(partial(ck.label_pull_loss, form="softmax")),
        _ONE_VISIT,
        columns=lambda n: LABELS,
    ),
    # Linear algebra of N x N matrices; the eager form holds one for each of the N anchors.
    "mmcl": Loss(
        _two_towers,
        eager.mmcl,
        partial(ck.mmcl_loss, **MMCL),
        _NONE,
        sizes=(128, 256, 512),
        elements=lambda n, m: n**3,
    ),
}
CORE = ("clip", "nt_xent", "info_nce")

# Providers that hold N × M matrices, and about how many they hold at their peak.
DENSE, DENSE_COPIES = ("eager", "autocast", "compile"), 4
PROVIDERS = ("ours", "ours-torch", *DENSE, "linear_cross_entropy")
# Ours with limited scratch memory, in bytes.
LIMITED = {"ours-128MB": 128 * 10**6, "ours-512MB": 512 * 10**6}
# Ours with saved similarities.
SAVED = "ours-saved"
ALL_PROVIDERS = (*PROVIDERS, "graph", *LIMITED, SAVED, *peers.PEERS)


def provider_function(provider: str, case: Case, device: torch.device) -> LossFunction:
    """Return the function by which ``provider`` computes ``case``; raise `Unavailable` with the reason if it does not.

    The function and its backward must run inside `memory_of`.
    """
    loss = LOSSES[case.loss]
    if provider in ("ours", SAVED, *LIMITED):
        return loss.ours
    if provider == "ours-torch":
        if "backend" not in inspect.signature(loss.ours).parameters:
            raise Unavailable("has no backends")
        return partial(loss.ours, backend="torch")
    if provider == "graph":
        return _graphed(loss.ours, case, device)
    if provider == "eager":
        return loss.eager
    if provider == "compile":
        # One program per size, as for the fixed batch of a training run. Without a reset Dynamo stops after a few.
        torch.compiler.reset()
        return torch.compile(loss.eager, dynamic=False)
    if provider == "autocast":
        if case.dtype not in (torch.bfloat16, torch.float16):
            raise Unavailable("autocast is for bfloat16 and float16")
        return torch.autocast(device.type, case.dtype)(loss.eager)
    if provider in loss.others:
        return loss.others[provider]
    if provider in peers.PEERS:
        return peers.loss_function(provider, case.loss)
    raise Unavailable("does not compute this loss")


def _graphed(function: LossFunction, case: Case, device: torch.device) -> LossFunction:
    """Return the function as two CUDA graphs, forward and backward; a call copies its inputs into theirs."""
    if device.type != "cuda":
        raise Unavailable("CUDA graphs need a CUDA device")
    inputs = case.inputs(device)
    replay = torch.cuda.make_graphed_callables(
        lambda *values: function(**dict(zip(inputs, values, strict=True))), tuple(inputs.values())
    )
    return lambda **inputs: replay(*inputs.values())


@contextmanager
def memory_of(provider: str) -> Iterator[None]:
    """Set the limits of scratch memory and of saved scores that belong to the provider, and reset them at the end."""
    ck.set_workspace_limit(LIMITED.get(provider))
    ck.set_saved_scores_limit(2**62 if provider == SAVED else None)
    try:
        yield
    finally:
        ck.set_workspace_limit(None)
        ck.set_saved_scores_limit(None)


# A provider may have three times the error of eager in the same dtype, plus this floor. The check tells a wrong formula
# from rounding; the tests bound the error itself.
_FLOOR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CHECK_ROWS = 192


def check(provider: str, case: Case, device: torch.device) -> None:
    """Raise `Unavailable` unless value and gradients agree with plain PyTorch in float64 at a small size."""
    if found := objections(provider, replace(case, n=CHECK_ROWS), device):
        raise Unavailable(f"differs from float64: {found}")


@cache
def objections(provider: str, case: Case, device: torch.device) -> str:
    """Return as text the errors against plain PyTorch in float64 that rounding does not explain; empty without any."""
    inputs, exact = case.inputs(device), exact_results(case, device)
    allowed = value_and_gradients(provider_function("eager", case, device), inputs)
    with memory_of(provider):
        found = value_and_gradients(provider_function(provider, case, device), inputs)
    return unexplained(found, allowed, exact, case.dtype)


def exact_results(case: Case, device: torch.device) -> Inputs:
    """Return value and gradients of plain PyTorch in float64."""
    inputs = {
        name: value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value
        for name, value in case.inputs(device).items()
    }
    return value_and_gradients(LOSSES[case.loss].eager, inputs)


def unexplained(found: Inputs, allowed: Inputs, exact: Inputs, dtype: torch.dtype) -> str:
    """Return as text the relative errors (in the 2-norm) of results that are too large beside those of `allowed`."""

    def error(results: Inputs, name: str) -> float:
        return ((results[name].double() - exact[name]).norm() / exact[name].norm()).item()

    errors = {name: error(found, name) for name in exact}
    wrong = [name for name in exact if not errors[name] <= 3 * error(allowed, name) + _FLOOR[dtype]]
    return ", ".join(f"{name} by {errors[name]:.0e}" for name in wrong)


def value_and_gradients(function: LossFunction, inputs: Inputs) -> Inputs:
    """Return the value of a loss and its gradients, by name."""
    value = function(**inputs)
    return {"value": value.detach()} | {f"gradient of {name}": g for name, g in gradients(value, inputs).items()}


def gradients(loss: Tensor, inputs: Inputs) -> Inputs:
    """Return the gradients of ``loss`` for the inputs that require one, by name."""
    leaves = {name: value for name, value in inputs.items() if value.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
