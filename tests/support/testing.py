"""What tests share: the losses under test, the grids with their reasons, and the comparison with a yardstick."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import os
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from contrastive_kernels.engine.backends import BACKENDS

ROOT = pathlib.Path(__file__).parents[2]
HALF = (torch.bfloat16, torch.float16)

# Relative error of a value or gradient, as RMS and as maximum, beyond which a result is wrong rather than rounded.
# test_accuracy.py has the sharp bound, a multiple of PyTorch's own error.
# Half precision: about five roundings, of unit rows, of their gradient and of the gradient of the given rows.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}

# (N, M, D) and what breaks there first.
SHAPES = {
    (1, 1, 1): "one of everything: no negative in the batch, a single column",
    (2, 63, 24): "fewer rows than any vector register, M one below a tile edge",
    (63, 65, 100): "one below and one above a tile edge; D no multiple of 8",
    (129, 2, 200): "two tiles and one row; fewer columns than rows; D above 128",
    (520, 129, 24): "more rows than the largest tile, with a ragged last one",
}


# float32 everywhere; the other dtypes where both sides are ragged, and where only the positive is left.
GRID = [
    *((shape, torch.float32) for shape in SHAPES),
    ((63, 65, 100), torch.bfloat16),
    ((63, 65, 100), torch.float64),
    ((1, 1, 1), torch.float64),
]


def shape_id(shape) -> str:
    return "-".join(f"{name}{size}" for name, size in zip("NMD", shape, strict=True))


def dtype_id(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def backends() -> list:
    """Return the backends that can run here; triton on a GPU, or interpreted if TRITON_INTERPRET=1 asks for it."""
    names = ["torch"]
    if supports("cpp", torch.float32):
        names.append("cpp")
    if torch.cuda.is_available():
        names.append(pytest.param("triton", marks=pytest.mark.gpu))
    elif os.environ.get("TRITON_INTERPRET") == "1":
        names.append("triton")
    return names


def grid_params() -> list:
    """Return GRID as parameters."""
    return [pytest.param(*point, id=f"{shape_id(point[0])}-{dtype_id(point[1])}") for point in GRID]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def supports(backend: str, dtype: torch.dtype) -> bool:
    """Return whether the backend takes the dtype; bfloat16 products in Triton's interpreter are silently wrong."""
    device = device_of(backend)
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        return False
    return not BACKENDS[backend].not_supported_reasons(torch.zeros(2, 2, dtype=dtype, device=device))


def precise(backend: str) -> torch.dtype:
    """Return float64 if the backend has it, else float32."""
    return torch.float64 if supports(backend, torch.float64) else torch.float32


@contextlib.contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Run with so many OpenMP threads, of which torch.get_num_threads() tells.

    After torch.set_num_threads MKL also starts threads inside threads, and batched solves hang (PyTorch 2.13).
    """
    set_threads, before = ctypes.CDLL(None).omp_set_num_threads, torch.get_num_threads()
    set_threads(count)
    try:
        assert torch.get_num_threads() == count
        yield
    finally:
        set_threads(before)


@dataclass(frozen=True)
class Case:
    """A loss with the shapes of its features; the names are the arguments of the function."""

    loss: str
    shapes: Callable[[int, int, int], dict[str, tuple[int, ...]]]
    options: dict = field(default_factory=dict)
    detached: tuple[str, ...] = ()
    scale: str = "temperature"
    unit: bool = False  # the features are normalised before, as this loss expects
    without: tuple[str, ...] = ()  # arguments that are errors with these options

    def features(self, shape, dtype=torch.float64, device="cpu") -> dict[str, torch.Tensor]:
        """Return standard normal features of that shape, drawn in float64 and rounded; labels from -1 (none) to 3."""
        features = {}
        for name, size in self.shapes(*shape).items():
            if name == "labels":
                features[name] = ((torch.arange(*size) + 1) % 5 - 1).to(device)
                continue
            x = torch.randn(size, dtype=torch.float64)
            features[name] = (F.normalize(x, dim=-1) if self.unit else x).to(dtype).to(device)
        return features

    def takes(self, argument: str) -> bool:
        return argument in inspect.signature(getattr(ck, self.loss)).parameters and argument not in self.without

    def __call__(self, module, features, **options):
        """Return the loss of `contrastive_kernels` or of `python_ref`; a loss without a sweep takes no backend."""
        if not self.takes("backend"):
            options.pop("backend", None)
        return getattr(module, self.loss)(**{**self.options, **options, **features})


def two(first, second):
    return lambda n, m, d: {first: (n, d), second: (n, d)}


def views(count):
    return lambda n, m, d: {"views": (n, count, d)}


def predictions(n, m, d):
    return dict.fromkeys(("p0", "z0", "p1", "z1"), (n, d))


def queries_keys_queue(n, m, d):
    return {"query": (n, 2, d), "keys": (n, 3, d), "queue": (m, d)}


def query_keys_queue(n, m, d):
    return {"query": (n, d), "keys": (n, 3, d), "queue": (m, d)}


BAND = ck.Polarization(lower=0.1, upper=0.5, weight=0.3)

SOFTMAX = {
    "info_nce": Case("info_nce_loss", two("query", "positive_key")),
    "info_nce-symmetric": Case("info_nce_loss", two("query", "positive_key"), {"symmetric": True}),
    "info_nce-shared": Case(
        "info_nce_loss",
        lambda n, m, d: {"query": (n, d), "positive_key": (n, d), "negative_keys": (m, d)},
    ),
    "info_nce-shared-in_batch": Case(
        "info_nce_loss",
        lambda n, m, d: {"query": (n, d), "positive_key": (n, d), "negative_keys": (m, d)},
        {"in_batch_negatives": True},
    ),
    "info_nce-paired": Case(
        "info_nce_loss",
        lambda n, m, d: {"query": (n, d), "positive_key": (n, d), "negative_keys": (n, min(m, 9), d)},
        {"negative_mode": "paired"},
    ),
    "nt_xent": Case("nt_xent_loss", two("z0", "z1")),
    "clip": Case(
        "clip_loss",
        two("image_features", "text_features"),
        {"logit_scale": 14.3},
        scale="logit_scale",
        unit=True,
    ),
    "nt_xent-views": Case("nt_xent_loss", lambda n, m, d: {"z0": (n, 4, d)}),
    "moco": Case(
        "moco_loss",
        lambda n, m, d: {"query": (n, d), "key": (n, d), "queue": (m, d)},
        detached=("key", "queue"),
    ),
}
POLARIZED = {
    "info_nce-polarized": Case("info_nce_loss", two("query", "positive_key"), {"polarization": BAND}),
    "nt_xent-polarized": Case("nt_xent_loss", two("z0", "z1"), {"polarization": BAND}),
}
VIEWS = {
    "arcl": Case("arcl_loss", views(4)),
    "arcl-mean": Case("arcl_loss", views(4), {"positive": "mean"}),
    "arcl-one_view": Case("arcl_loss", views(3), {"denominator": "one_view"}),
    "arcl-positive+one_view": Case("arcl_loss", views(3), {"denominator": "positive+one_view"}),
    "arcl-positive+two_view": Case("arcl_loss", views(2), {"denominator": "positive+two_view"}),
    "moco_arcl": Case("moco_arcl_loss", query_keys_queue, detached=("keys", "queue")),
    "moco_arcl-mean": Case("moco_arcl_loss", query_keys_queue, {"positive": "mean"}, ("keys", "queue")),
    "moco_arcl-all": Case("moco_arcl_loss", queries_keys_queue, {"pairs": "all"}, ("keys", "queue")),
    "moco_arcl-mean_loss": Case("moco_arcl_loss", query_keys_queue, {"positive": "mean_loss"}, ("keys", "queue")),
}
CASES = {**SOFTMAX, **POLARIZED, **VIEWS}


def views_and_labels(n, m, d):
    return {"features": (n, 2, d), "labels": (n,)}


def rows_and_labels(n, m, d):
    return {"z": (n, d), "labels": (n,), "label_embeddings": (4, d)}


def rows_and_support(n, m, d):
    return {"z": (n, d), "predictions": (n, d), "support": (m, d)}


# Losses that select pairs take their rows unnormalised: another rounding would change the selection.
AS_THEY_ARE = {"normalize": False}

# All other losses, in their main forms; the options of each are tested in its own file.
FAMILY = {
    "sup_con": Case("sup_con_loss", views_and_labels),
    "sup_con-in": Case("sup_con_loss", views_and_labels, {"positives": "in"}),
    "sup_con-pairwise": Case("sup_con_loss", views_and_labels, {"positives": "pairwise"}),
    "label_pull": Case("label_pull_loss", rows_and_labels, without=("temperature", "logit_scale")),
    "label_pull-softmax": Case("label_pull_loss", rows_and_labels, {"form": "softmax"}),
    "debiased": Case("debiased_loss", two("z0", "z1")),
    "hard_negative": Case("hard_negative_loss", two("z0", "z1")),
    "decoupled": Case("decoupled_loss", two("z0", "z1")),
    "quick_thoughts": Case("quick_thoughts_loss", two("first", "second"), unit=True),
    "nnclr": Case("nnclr_loss", rows_and_support, AS_THEY_ARE, detached=("z", "support"), unit=True),
    "false_negative": Case("false_negative_loss", two("z0", "z1"), {**AS_THEY_ARE, "threshold": 0.1}, unit=True),
    "false_negative-attract": Case(
        "false_negative_loss", two("z0", "z1"), {**AS_THEY_ARE, "threshold": 0.1, "mode": "attract"}, unit=True
    ),
    "easy_negative": Case("easy_negative_loss", two("query", "positive_key"), {**AS_THEY_ARE, "k": 20}, unit=True),
    "siglip": Case(
        "siglip_loss",
        two("image_features", "text_features"),
        {"logit_scale": 10.0, "logit_bias": -10.0},
        scale="logit_scale",
        unit=True,
    ),
    "triplet_margin": Case("triplet_margin_loss", two("anchor", "positive")),
    "triplet_margin-euclidean": Case(
        "triplet_margin_loss", two("anchor", "positive"), {**AS_THEY_ARE, "metric": "euclidean"}, unit=True
    ),
    "triplet_margin-hardest": Case(
        "triplet_margin_loss", two("anchor", "positive"), {**AS_THEY_ARE, "mining": "hardest"}, unit=True
    ),
    "triplet_margin-hardest-euclidean": Case(
        "triplet_margin_loss",
        two("anchor", "positive"),
        {**AS_THEY_ARE, "mining": "hardest", "metric": "euclidean"},
        unit=True,
    ),
    "uniformity": Case("uniformity_loss", lambda n, m, d: {"z": (n, d)}, {"t": 0.3}),
    "t_simclr": Case("t_simclr_loss", two("z0", "z1")),
    "simsiam": Case("simsiam_loss", predictions, detached=("z0", "z1")),
    "byol": Case("byol_loss", predictions, detached=("z0", "z1")),
    "alignment": Case("alignment_loss", views(3)),
    "augmentation_robust": Case("augmentation_robust_loss", views(3), unit=True),
    "spectral_contrastive": Case("spectral_contrastive_loss", two("z0", "z1")),
    "barlow_twins": Case("barlow_twins_loss", two("z0", "z1")),
    "vicreg": Case("vicreg_loss", two("z0", "z1")),
    "distance_polarization": Case("distance_polarization", lambda n, m, d: {"z": (n, d)}, AS_THEY_ARE, unit=True),
    "mmcl": Case("mmcl_loss", two("z0", "z1"), {"sigma": 1.0}),
}


def case_params(cases) -> list:
    return [pytest.param(case, id=name) for name, case in cases.items()]


def matching_ids(case: Case, n: int, m: int) -> dict[str, torch.Tensor]:
    """Return ids with about two rows each, under the names and in the lengths that the loss expects."""
    shapes, rows = case.shapes(n, m, 1), torch.randint(max(n // 2, 1), (n,))
    if "query" not in shapes:
        return {"ids": rows}
    if case.options.get("negative_mode") == "paired":
        columns = shapes["negative_keys"][:2]
    elif "queue" in shapes or "negative_keys" in shapes:
        columns = (m,)
    else:
        return {"query_ids": rows}
    keys = torch.randint(max(n // 2, 1), columns)
    return {"query_ids": rows, "key_ids": torch.cat([rows, keys]) if case.options.get("in_batch_negatives") else keys}


# Arguments that change the result, as functions of (case, N, M). Scalars and vectors are float64.
OPTIONS: dict[str, Callable[[Case, int, int], dict]] = {
    "mean": lambda case, n, m: {},
    "sum": lambda case, n, m: {"reduction": "sum"},
    "float scale": lambda case, n, m: {"logit_scale": 7.0},
    "tensor scale": lambda case, n, m: {"logit_scale": torch.tensor(7.0, dtype=torch.float64)},
    "tensor temperature": lambda case, n, m: {"temperature": torch.tensor(0.2, dtype=torch.float64)},
    "negative scale": lambda case, n, m: {"logit_scale": -7.0},
    "other rows": lambda case, n, m: {"normalize": case.unit, "logit_scale": 0.7},
    "weight": lambda case, n, m: {"weight": torch.rand(n, dtype=torch.float64)},
    "weight, none": lambda case, n, m: {"weight": torch.rand(n, dtype=torch.float64), "reduction": "none"},
    "ids": matching_ids,
    "cutoff": lambda case, n, m: {"cutoff": 0.1},
    "cutoff per anchor": lambda case, n, m: {"cutoff": torch.linspace(-0.1, 0.3, n, dtype=torch.float64)},
    "cutoff margin": lambda case, n, m: {"cutoff_margin": 0.05},
    "cutoff margin per anchor": lambda case, n, m: {"cutoff_margin": torch.linspace(-0.1, 0.3, n, dtype=torch.float64)},
    "label smoothing": lambda case, n, m: {"label_smoothing": 0.1},
    "label smoothing of survivors": lambda case, n, m: {
        "label_smoothing": 0.1,
        "cutoff_margin": 0.05,
        **matching_ids(case, n, m),
    },
    "label smoothing, ids": lambda case, n, m: {"label_smoothing": 0.1, **matching_ids(case, n, m)},
}


def option_params(cases, names=tuple(OPTIONS)) -> list:
    """Return every case with every option that it takes."""
    return [
        pytest.param(case, OPTIONS[name], id=f"{case_name}-{name.replace(' ', '_')}")
        for case_name, case in cases.items()
        for name in names
        if not (case.scale == "logit_scale" and "temperature" in name)
    ]


class Outcome(NamedTuple):
    """A value and the gradients of its inner product with a fixed upstream gradient."""

    value: torch.Tensor
    gradients: dict[str, torch.Tensor]


def differentiate(function: Callable[..., torch.Tensor], tensors: dict[str, torch.Tensor]) -> Outcome:
    """Return the value of ``function(**tensors)`` and its gradients for all floating tensors."""
    leaves = {name: x.detach().requires_grad_() if x.is_floating_point() else x for name, x in tensors.items()}
    value = function(**leaves)
    # an upstream gradient of both signs, the same for every dtype and backend
    steps = torch.arange(value.numel(), dtype=torch.float64).reshape(value.shape)
    upstream = (1 + torch.cos(2.1 * steps)) if value.dim() else torch.tensor(0.7)
    value.backward(upstream.to(value))
    return Outcome(value.detach(), {name: x.grad for name, x in leaves.items() if x.is_floating_point()})


def errors(ours: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Return RMS and maximum of the difference, in float64."""
    difference = (ours.detach().cpu().double() - reference.detach().cpu().double()).abs()
    if not difference.numel():
        return 0.0, 0.0
    return difference.square().mean().sqrt().item(), difference.max().item()


def sizes(reference: torch.Tensor) -> tuple[float, float]:
    return errors(reference, torch.zeros_like(reference))


def assert_matches(ours, reference, dtype, what="value", scale=0.0):
    """Relative RMS and maximum error stay within TOLERANCE, plus a few roundings of quantities of size `scale`."""
    assert ours.shape == reference.shape, f"{what}: {tuple(ours.shape)} is not {tuple(reference.shape)}"
    rounded = ours.dtype if ours.dtype in HALF else torch.promote_types(dtype, torch.float32)
    bound, slack = TOLERANCE[dtype], 8 * torch.finfo(rounded).eps * scale
    finite = reference.isfinite()
    assert torch.equal(ours.cpu()[~finite].double(), reference.cpu()[~finite].double()), f"{what}: inf or NaN"
    ours, reference = ours[finite], reference[finite]
    for name, error, size in zip(("RMS", "maximum"), errors(ours, reference), sizes(reference), strict=True):
        assert error <= bound * size + slack, f"{what}: {name} error {error:.3g}, size {size:.3g}"


def assert_outcomes_match(ours: Outcome, reference: Outcome, dtype, scale=0.0):
    """Values and all gradients match; a missing gradient stands for zero.

    A gradient whose terms, of size `scale`, cancel to 0 (D = 1) may be as large as their rounding; no other may.
    """
    assert_matches(ours.value, reference.value, dtype, "value", 1.0)
    for name, expected in reference.gradients.items():
        got = ours.gradients[name]
        if got is not None and expected is not None:
            nothing = not expected.numel() or expected.abs().max() <= 1e-13 * scale
            assert_matches(got, expected, dtype, f"gradient of {name}", scale if nothing else 0.0)
        else:
            assert all(g is None or not g.any() for g in (got, expected)), f"gradient of {name}: only one is missing"


def check(case: Case, shape, dtype, backend, **options):
    """Compare `case` on `backend` in `dtype` with the reference in float64 on the same rounded features."""
    features = case.features(shape, dtype, device_of(backend))
    tensors = {k: v for k, v in options.items() if torch.is_tensor(v)}
    others = {k: v for k, v in options.items() if not torch.is_tensor(v)}
    ours = differentiate(
        lambda **t: case(ck, t, **others, backend=backend),
        {**features, **{k: v.to(device_of(backend)) for k, v in tensors.items()}},
    )
    wide = {k: v.double() if v.is_floating_point() else v for k, v in {**features, **tensors}.items()}
    reference = differentiate(lambda **t: case(python_ref, t, **others), {k: v.cpu() for k, v in wide.items()})
    expected = dtype if dtype == torch.float64 else torch.float32
    assert ours.value.dtype == expected, f"the loss is {ours.value.dtype}, not {expected}"
    for name, gradient in ours.gradients.items():
        if name in case.detached:
            assert gradient is None, f"{name} is detached"
        elif name in features:
            assert gradient.dtype == dtype
    # terms of size 1 / T
    assert_outcomes_match(ours, reference, dtype, scale=20.0)
    return ours, reference


def check_statistics(case: Case, shape, dtype, backend, **options):
    """Compare the statistics of `case`; asking for them changes neither the loss nor its gradients."""
    features = case.features(shape, dtype, device_of(backend))
    options = {k: v.to(device_of(backend)) if torch.is_tensor(v) else v for k, v in options.items()}
    plain = differentiate(lambda **t: case(ck, t, **options, backend=backend), features)
    found = []

    def with_statistics(**tensors):
        loss, statistics = case(ck, tensors, **options, return_stats=True, backend=backend)
        found.append(statistics)
        return loss

    again = differentiate(with_statistics, features)
    assert_outcomes_match(again, Outcome(plain.value.double(), plain.gradients), dtype, 1.0)
    wide = {k: v.cpu().double() if v.is_floating_point() else v.cpu() for k, v in features.items()}
    options = {k: v.cpu() if torch.is_tensor(v) else v for k, v in options.items()}
    _, expected = case(python_ref, wide, **options, return_stats=True)
    for name in expected._fields:
        value = getattr(found[0], name)
        assert not value.requires_grad, f"{name} is not detached"
        assert value.dtype == plain.value.dtype
        assert_matches(value, getattr(expected, name).detach(), dtype, name, 20.0)


def within(ours, eager, reference, factor, dtype, most=None) -> str | None:
    """Return what breaks the contract: RMS and maximum error within `factor` times PyTorch's, plus one rounding.

    The maximum within `most` times, if given.
    """
    eps = torch.finfo(dtype).eps
    for name, bound, mine, theirs, size in zip(
        ("RMS", "maximum"),
        (factor, most or factor),
        errors(ours, reference),
        errors(eager, reference),
        sizes(reference),
        strict=True,
    ):
        # written so that a NaN fails
        if not mine <= bound * theirs + eps * size:
            return f"{name} error {mine:.3g}, PyTorch {theirs:.3g}, size {size:.3g}"
    return None
