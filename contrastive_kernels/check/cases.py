"""The calls that are checked: every loss, with the options that take other paths through the kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from contrastive_kernels import losses
from contrastive_kernels.check import dense

CLASSES = 5
NO_FEATURES = ("ids", "query_ids", "labels", "contrast_labels", "exclude", "weight", "guide")


@dataclass(frozen=True)
class Case:
    """One call of a loss.

    Attributes:
        loss: the name of the loss, which its file and its function in `dense` have too.
        inputs: the names of the tensors and their shapes, a letter or digit for a size: ``"N3D"`` is ``(N, 3, D)``.
            ``"guide[0]"`` and ``"guide[1]"`` are a tuple.
        scalars: arguments that are trained, as 0-dim tensors.
        options: the other arguments.
        reduction: of a loss that takes one.
        detached: inputs without gradient.
        unit: the rows have norm 1 before they are rounded and are not normalised again: another rounding would change
            which of them are selected, or on which side of a kink they are.
        factor: how many times the bound of the other losses the error may be.
    """

    loss: str
    inputs: Mapping[str, str]
    scalars: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    reduction: str = "none"
    detached: tuple[str, ...] = ()
    unit: bool = False
    factor: float = 1.0

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {letters}" for name, letters in self.inputs.items())
        options = {**self.options, "reduction": self.reduction} if self.reduction != "none" else self.options
        return "; ".join([f"{self.loss}({shapes})", *(f"{name}={value}" for name, value in options.items())])

    @property
    def differentiable(self) -> list[str]:
        """The names of the tensors that have a gradient."""
        constant = (*self.detached, *NO_FEATURES)
        return [name for name in (*self.inputs, *self.scalars) if name.partition("[")[0] not in constant]

    def tensors(self, n: int, m: int, d: int, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        """Return the inputs and the scalars, on the CPU."""
        random = torch.Generator().manual_seed(seed)
        # On a line all similarities of unit rows are 1 or -1: nothing to select.
        size = {"N": n, "M": m, "D": max(d, 2) if self.unit else d}
        tensors = {}
        for name, letters in self.inputs.items():
            shape = [size.get(letter) or int(letter) for letter in letters]
            if name.endswith("ids"):
                tensors[name] = torch.randint(max(n // 2, 1), shape, generator=random)
            elif name.endswith("labels"):
                tensors[name] = torch.randint(-1, min(CLASSES, m), shape, generator=random)
            elif name == "exclude":
                tensors[name] = torch.randint(-1, m, shape, generator=random)
            elif name == "weight":
                tensors[name] = 0.5 + torch.rand(shape, dtype=dtype, generator=random)
            else:
                rows = torch.randn(shape, dtype=torch.float64, generator=random)
                tensors[name] = (dense.unit(rows) if self.unit else rows).to(dtype)
        trained = torch.promote_types(dtype, torch.float32)
        return tensors | {name: torch.tensor(value, dtype=trained) for name, value in self.scalars.items()}

    def ours(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of the package."""
        function = _function(self.loss)
        options = dict(self.options)
        if "reduction" in inspect.signature(function).parameters:
            options["reduction"] = self.reduction
        loss: Tensor = function(**arguments_of(tensors), **options)
        return loss

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the loss in plain PyTorch."""
        arguments = {name: x for name, x in arguments_of(tensors).items() if name != "weight"}
        anchors: Tensor = getattr(dense, self.loss)(**arguments, **self.options)
        if "weight" in tensors:
            weight = dense.wide(tensors["weight"]).repeat(anchors.numel() // len(tensors["weight"])).view_as(anchors)
            anchors = anchors * weight / (weight.mean() if self.reduction == "mean" else 1)
        if self.reduction == "none":
            return anchors
        return anchors.sum() if self.reduction == "sum" else anchors.mean()


def arguments_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the tensors by the names of arguments."""
    arguments: dict[str, Any] = {}
    for name, x in tensors.items():
        argument, is_part, _ = name.partition("[")
        arguments[argument] = (*arguments.get(argument, ()), x) if is_part else x
    return arguments


def _function(loss: str) -> Callable[..., Any]:
    if loss == "lmcl":
        return _lmcl
    function: Callable[..., Any] = getattr(losses, f"{loss}_loss", None) or getattr(losses, loss)
    return function


def _lmcl(first: Tensor, second: Tensor, *, lower: float, upper: float, share: float, **options: Any) -> Any:
    return losses.LMCLLoss(lower=lower, upper=upper, weight=share, reduction="none")(first, second, **options)


def _pair(first: str, second: str, **others: str) -> dict[str, str]:
    return {first: "ND", second: "ND", **others}


VIEWS = _pair("z0", "z1")
PREDICTIONS = _pair("p0", "z0") | _pair("p1", "z1")
QUERY_KEY = _pair("query", "positive_key")
IMAGE_TEXT = _pair("image_features", "text_features")
TRIPLET = _pair("anchor", "positive")
ROWS = {"features": "N2D", "labels": "N", "contrast_features": "MD", "contrast_labels": "M", "exclude": "N"}
LABELLED = {"z": "ND", "labels": "N", "label_embeddings": "MD"}
SCALE = {"logit_scale": 8.0}
MILD = {"logit_scale": 2.0}
SIGMOID = {"logit_scale": 8.0, "logit_bias": -4.0}
SELECTING = {"normalize": False}
BAND = {"lower": 0.3, "upper": 0.6}
QUEUE = ("key", "keys", "queue")

CASES = (
    # candidate softmax
    Case("info_nce", QUERY_KEY, SCALE),
    Case("info_nce", QUERY_KEY | {"query_ids": "N"}, SCALE, {"symmetric": True, "label_smoothing": 0.1}),
    Case("info_nce", QUERY_KEY | {"negative_keys": "MD", "weight": "N"}, SCALE, {"in_batch_negatives": True}, "mean"),
    Case("info_nce", QUERY_KEY | {"negative_keys": "N9D"}, SCALE, {"negative_mode": "paired"}),
    Case("info_nce", QUERY_KEY | {"guide[0]": "ND", "guide[1]": "ND"}, SCALE, SELECTING, unit=True),
    Case("nt_xent", VIEWS | {"ids": "N", "weight": "N"}, SCALE, reduction="mean"),
    Case("nt_xent", {"z0": "N3D"}, SCALE, {"label_smoothing": 0.1}),
    Case("clip", IMAGE_TEXT, {"logit_scale": 1.0, "logit_bias": 0.5}),
    Case("clip", IMAGE_TEXT | {"ids": "N"}, SCALE, {"normalize": True}, "mean"),
    Case("moco", {"query": "ND", "key": "ND", "queue": "MD"}, SCALE, detached=QUEUE),
    Case("arcl", {"views": "N4D"}, SCALE, SELECTING, unit=True),
    Case("arcl", {"views": "N3D"}, SCALE, {"positive": "mean", "denominator": "one_view"}),
    Case(
        "moco_arcl", {"query": "ND", "keys": "N3D", "queue": "MD"}, SCALE, SELECTING, detached=QUEUE, unit=True
    ),
    Case("decoupled", VIEWS, SCALE),
    Case("decoupled", VIEWS | {"positive_weight[0]": "N", "positive_weight[1]": "N"}, SCALE),
    Case(
        "nnclr", {"z": "ND", "predictions": "ND", "support": "MD"}, SCALE, SELECTING,
        detached=("z", "support"), unit=True,
    ),
    *(
        Case("false_negative", VIEWS, SCALE, SELECTING | {"mode": mode, "threshold": 0.1, "top_k": k}, unit=True)
        for mode in ("eliminate", "attract") for k in (4, None)
    ),
    Case("easy_negative", QUERY_KEY, SCALE, SELECTING | {"select": "bottomk", "k": 9}, unit=True),
    Case("easy_negative", QUERY_KEY, SCALE, SELECTING | {"select": "below", "threshold": -0.1}, unit=True),
    Case("quick_thoughts", _pair("first", "second"), options={"context_size": 2}),
    # classes
    *(
        Case("sup_con", {"features": "N2D", "labels": "N"}, SCALE, {"positives": positives})
        for positives in ("out", "in", "pairwise")
    ),
    *(Case("sup_con", ROWS, SCALE, {"positives": positives}) for positives in ("out", "pairwise")),
    Case("label_pull", LABELLED, options={"form": "pull"}),
    Case("label_pull", LABELLED, SCALE, {"form": "softmax"}),
    # corrected negatives
    Case("debiased", VIEWS, MILD, {"tau_plus": 0.1}),
    Case("hard_negative", VIEWS, MILD, {"tau_plus": 0.1, "beta": 0.5}),
    # sums over pairs
    Case("siglip", IMAGE_TEXT | {"ids": "N"}, SIGMOID, {"normalize": True}),
    Case("siglip", IMAGE_TEXT | {"weight": "N"}, SIGMOID, {"normalize": True}, "mean"),
    Case("distance_polarization", {"z": "ND"}, options=SELECTING | BAND, unit=True),
    Case("distance_polarization", {"z": "ND"}, options=SELECTING | BAND, reduction="sum", unit=True),
    Case("lmcl", _pair("first", "second"), SCALE, SELECTING | BAND | {"share": 2.0}, unit=True),
    Case("spectral_contrastive", VIEWS, options={"method": "tile"}),
    Case("spectral_contrastive", VIEWS, options={"method": "gram"}, reduction="mean"),
    *(
        Case("triplet_margin", TRIPLET, {"margin": 0.2}, SELECTING | {"mining": mining, "metric": metric}, unit=True)
        for mining in ("all", "hardest") for metric in ("similarity", "euclidean")
    ),
    Case("uniformity", {"z": "ND"}, {"t": 0.3}),
    Case("t_simclr", VIEWS, {"temperature": 8.0}, {"df": 5.0}),
    # moments and views
    Case("barlow_twins", VIEWS, {"lambd": 0.0051}),
    Case("barlow_twins", VIEWS, {"lambd": 0.0051}, {"std_eps": 1e-3}),
    Case("vicreg", VIEWS, {"sim_weight": 25.0, "var_weight": 25.0, "cov_weight": 1.0}),
    Case("vicreg", {"z0": "N3D", "z1": "N3D"}, {"sim_weight": 25.0, "var_weight": 25.0, "cov_weight": 1.0}),
    Case("simsiam", PREDICTIONS, detached=("z0", "z1")),
    Case("byol", PREDICTIONS, detached=("z0", "z1")),
    Case("alignment", {"views": "N3D"}),
    Case("augmentation_robust", {"views": "N3D"}),
    # support vector machines: the solver magnifies a rounding
    Case("mmcl", VIEWS, {"sigma": 1.0}, {"C": 100.0, "reg": 0.1}, factor=5.0),
)  # fmt: skip
