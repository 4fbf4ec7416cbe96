"""The cases of pytorch_metric_learning."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from contrastive_kernels.compat.check.case import Case, Draw

DISTRIBUTION = "pytorch-metric-learning"


def peer() -> ModuleType:
    """Return the module whose names the adapter has."""
    return importlib.import_module("pytorch_metric_learning.losses")


def _made(kind: str, name: str, **options: Any) -> Any:
    return getattr(importlib.import_module(f"pytorch_metric_learning.{kind}"), name)(**options)


# Of how many classes the labels are, so that some rows have several positives, some one, some none.
def _labels(draw: Draw, n: int, classes: int | None = None) -> Tensor:
    return draw.integers(classes or 1 + draw.n // 2, n) - 1


def _batch(name: str, options: Callable[[], dict[str, Any]], dtype: torch.dtype = torch.int64) -> Any:
    def run(module: Any, draw: Draw) -> Tensor:
        loss = getattr(module, name)(**options())
        value: Tensor = loss(draw.rows(draw.n, 5), _labels(draw, draw.n).to(dtype))
        return value

    return run


def _one_class(name: str) -> Any:
    def run(module: Any, draw: Draw) -> Tensor:
        value: Tensor = getattr(module, name)()(draw.rows(draw.n, 5), torch.zeros(draw.n, dtype=torch.int64))
        return value

    return run


def _all_different(name: str) -> Any:
    def run(module: Any, draw: Draw) -> Tensor:
        value: Tensor = getattr(module, name)()(draw.rows(draw.n, 5), torch.arange(draw.n))
        return value

    return run


def _references(name: str) -> Any:
    def run(module: Any, draw: Draw) -> Tensor:
        m = draw.n + 3
        loss, classes = getattr(module, name)(temperature=0.2), 1 + draw.n // 2
        labels, ref_labels = _labels(draw, draw.n, classes), _labels(draw, m, classes)
        value: Tensor = loss(draw.rows(draw.n, 5), labels, ref_emb=draw.rows(m, 5), ref_labels=ref_labels)
        return value

    return run


def _references_with_the_labels(name: str) -> Any:
    """Return calls whose references have the very labels of the anchors, by object, by value and by default."""

    def run(module: Any, draw: Draw) -> list[Tensor]:
        loss, labels = getattr(module, name)(), _labels(draw, draw.n)
        x, y = draw.rows(draw.n, 5), draw.rows(draw.n, 5)
        return [
            loss(x, labels, ref_emb=y, ref_labels=labels),
            loss(x, labels, ref_emb=y, ref_labels=labels.clone()),
            loss(x, labels, ref_emb=y),
            loss(x, labels, ref_emb=x, ref_labels=labels.clone()),
        ]

    return run


def _self_supervised(name: str, symmetric: bool) -> Any:
    def run(module: Any, draw: Draw) -> Tensor:
        loss = module.SelfSupervisedLoss(getattr(module, name)(), symmetric=symmetric)
        value: Tensor = loss(draw.rows(draw.n, 5), draw.rows(draw.n, 5))
        return value

    return run


def _pairs(name: str) -> Any:
    def run(module: Any, draw: Draw) -> Tensor:
        n = draw.n
        i, shift = torch.arange(n), 1 + n // 3
        pairs = (i, (i + 1) % n, i, (i + 1 + shift) % n)
        value: Tensor = getattr(module, name)()(draw.rows(n, 5), _labels(draw, n), pairs)
        return value

    return run


def _temperature(name: str) -> Any:
    def run(module: Any, draw: Draw) -> Tensor:
        loss = getattr(module, name)()
        loss.temperature = draw.leaf(0.3)
        value: Tensor = loss(draw.rows(draw.n, 5), _labels(draw, draw.n))
        return value

    return run


def _memory(name: str) -> Any:
    """Return the losses of batches that a memory of one and a half of them sees, and its state."""

    def run(module: Any, draw: Draw) -> dict[str, Tensor]:
        n = draw.n
        return _of_memory(module, name, draw, (3 * n + 1) // 2, [(n, n)] * 3)

    return run


def _memory_of_single_rows(name: str) -> Any:
    """Return the same for batches of one row, of a few classes."""

    def run(module: Any, draw: Draw) -> dict[str, Tensor]:
        return _of_memory(module, name, draw, 6, [(1, 2)] * 9)

    return run


def _of_memory(module: Any, name: str, draw: Draw, size: int, batches: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Return the losses of batches of so many rows and classes, and the state that they leave."""
    memory = module.CrossBatchMemory(getattr(module, name)(), 5, size)
    losses = {f"loss {i}": memory(draw.rows(n, 5), _labels(draw, n, classes)) for i, (n, classes) in enumerate(batches)}
    return {**losses, **{name: x.to(draw.dtype) for name, x in memory.state_dict().items()}}


def _masked_memory(module: Any, draw: Draw) -> list[Tensor]:
    memory = module.CrossBatchMemory(module.NTXentLoss(), 5, 2 * draw.n)
    mask = torch.arange(2 * draw.n) % 2 == 0
    n = 2 * draw.n
    return [memory(draw.rows(n, 5), _labels(draw, n, n), enqueue_mask=mask) for _ in range(2)]


def _cases(name: str) -> list[Case]:
    def dot() -> dict[str, Any]:
        return dict(distance=_made("distances", "DotProductSimilarity", normalize_embeddings=False), temperature=2.0)

    def unit_dot() -> dict[str, Any]:
        return dict(distance=_made("distances", "DotProductSimilarity"))

    def euclidean() -> dict[str, Any]:
        return dict(distance=_made("distances", "LpDistance"))

    def regularizer() -> dict[str, Any]:
        return dict(embedding_regularizer=_made("regularizers", "LpRegularizer"), embedding_reg_weight=0.1)

    def threshold() -> dict[str, Any]:
        return dict(reducer=_made("reducers", "ThresholdReducer", low=0.5))

    dense = " (dense)" if name == "NTXentLoss" else ""
    return [
        Case(name, "labels", _batch(name, lambda: dict(temperature=0.3))),
        Case(name, "labels of floats", _batch(name, dict, torch.float32)),
        Case(name, "one class", _one_class(name)),
        Case(name, "no two of a class", _all_different(name)),
        Case(name, "DotProductSimilarity of rows as they are", _batch(name, dot)),
        Case(name, "DotProductSimilarity", _batch(name, unit_dot)),
        Case(name, "LpDistance (dense)", _batch(name, euclidean)),
        Case(name, "embedding_regularizer", _batch(name, regularizer)),
        Case(name, "MeanReducer", _batch(name, lambda: dict(reducer=_made("reducers", "MeanReducer")))),
        Case(name, f"ThresholdReducer{dense}", _batch(name, threshold)),
        Case(name, "ref_emb", _references(name)),
        Case(name, "ref_emb with the anchors' labels", _references_with_the_labels(name)),
        Case(name, "SelfSupervisedLoss", _self_supervised(name, symmetric=True)),
        Case(name, "SelfSupervisedLoss, not symmetric", _self_supervised(name, symmetric=False)),
        Case(name, "indices_tuple (dense)", _pairs(name)),
        Case(name, "temperature with gradient", _temperature(name)),
    ]


CASES: tuple[Case, ...] = (
    *_cases("NTXentLoss"),
    *_cases("SupConLoss"),
    Case("CrossBatchMemory", "NTXentLoss", _memory("NTXentLoss")),
    Case("CrossBatchMemory", "SupConLoss", _memory("SupConLoss")),
    Case("CrossBatchMemory", "batches of one row", _memory_of_single_rows("NTXentLoss")),
    Case("CrossBatchMemory", "batches of one row, SupConLoss", _memory_of_single_rows("SupConLoss")),
    Case("CrossBatchMemory", "a loss that is the library's (dense)", _memory("ContrastiveLoss")),
    Case("CrossBatchMemory", "enqueue_mask (dense)", _masked_memory),
)
