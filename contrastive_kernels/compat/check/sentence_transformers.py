"""The cases of sentence_transformers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from contrastive_kernels.compat.check.case import Case, Draw

DISTRIBUTION = "sentence-transformers"

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
HARDNESS = ("in_batch_negatives", "hard_negatives", "all_negatives")


def peer() -> ModuleType:
    """Return the module whose names the adapter has."""
    return importlib.import_module("sentence_transformers.sentence_transformer.losses")


class Rows(nn.Module):
    """A sentence encoder whose sentences are their embeddings."""

    def __getitem__(self, index: int) -> Rows:
        """Return the only module."""
        return self

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the rows as embeddings."""
        return {"sentence_embedding": features["rows"]}


def _columns(draw: Draw, hard_negatives: int) -> list[Tensor]:
    return [draw.rows(draw.n, 5) for _ in range(2 + hard_negatives)]


def _loss(name: str, hard_negatives: int, **options: Any) -> Callable[[Any, Draw], Tensor]:
    """Return a call of a loss; a similarity is given by the name of its function."""

    def run(module: Any, draw: Draw) -> Tensor:
        given = dict(options)
        if "similarity_fct" in given:
            given["similarity_fct"] = getattr(
                importlib.import_module("sentence_transformers.util"), given.pop("similarity_fct")
            )
        loss = getattr(module, name)(Rows(), **given)
        columns = _columns(draw, hard_negatives)
        if name.startswith("Cached"):  # in mini-batches, as its encoder leaves them
            value: Tensor = loss.calculate_loss([list(column.split(1 + draw.n // 3)) for column in columns])
        else:
            value = loss([{"rows": column} for column in columns], None)
        return value

    return run


def _training_step(module: Any, draw: Draw) -> dict[str, Tensor | None]:
    """Return what the hook of a cached loss leaves, by the backward that it needs."""
    columns = _columns(draw, 1)
    loss = module.CachedMultipleNegativesRankingLoss(Rows(), mini_batch_size=1 + draw.n // 3)
    value = loss([{"rows": column} for column in columns], None)
    (2 * value).backward()
    found = {f"gradient of column {i}": column.grad for i, column in enumerate(columns)}
    return {"loss": value.detach(), **found}


def _attributes(module: Any, draw: Draw) -> Tensor:
    """Return the loss of options that are assigned after construction."""
    loss = module.CachedMultipleNegativesRankingLoss(Rows())
    loss.scale, loss.directions, loss.hardness_mode, loss.hardness_strength = 3.0, DIRECTIONS, "all_negatives", 2.0
    value: Tensor = loss.calculate_loss([[column] for column in _columns(draw, 1)])
    return value


def _cases(name: str) -> list[Case]:
    def case(what: str, hard_negatives: int, **options: Any) -> Case:
        return Case(name, what, _loss(name, hard_negatives, **options))

    both = ("query_to_doc", "doc_to_query")
    cases = [
        case("pairs", 0),
        case("hard negatives", 2, scale=7),
        case("dot_score", 1, similarity_fct="dot_score", scale=0.5),
        case("a similarity of the library's (dense)", 0, similarity_fct="euclidean_sim"),
        case("gather_across_devices without ranks", 1, gather_across_devices=True),
        case("per_direction", 0, directions=both, partition_mode="per_direction"),
        case("per_direction, hard negatives", 1, directions=both, partition_mode="per_direction"),
        case("per_direction of one", 1, partition_mode="per_direction"),
        case("per_direction, hardness", 1, directions=both, partition_mode="per_direction",
             hardness_mode="all_negatives", hardness_strength=9.0),
    ]  # fmt: skip
    for directions in (both, ("query_to_query", "query_to_doc"), ("query_to_doc", "doc_to_doc"), DIRECTIONS):
        cases += [case(f"{', '.join(directions)}, {k} hard negatives", k, directions=directions) for k in (0, 2)]
    for mode in HARDNESS:
        hardness = dict(hardness_mode=mode, hardness_strength=5.0)
        cases += [case(f"{mode}, {k} hard negatives", k, **hardness) for k in (0, 2)]
        cases += [case(f"{mode}, all directions", 1, directions=DIRECTIONS, **hardness)]
    return cases


def _symmetric(name: str) -> list[Case]:
    return [Case(name, "pairs", _loss(name, 0)), Case(name, "hard negatives", _loss(name, 1))]


CASES: tuple[Case, ...] = (
    *_cases("MultipleNegativesRankingLoss"),
    *_cases("CachedMultipleNegativesRankingLoss"),
    Case("CachedMultipleNegativesRankingLoss", "backward through the cache", _training_step),
    Case("CachedMultipleNegativesRankingLoss", "attributes assigned later", _attributes),
    *_symmetric("MultipleNegativesSymmetricRankingLoss"),
    *_symmetric("CachedMultipleNegativesSymmetricRankingLoss"),
)
