"""Embeddings of a large batch with the activations of one chunk of rows at a time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, cat, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from contrastive_kernels.engine.warn import warn

__all__ = ["ChunkedEncoder", "encode_in_chunks"]

Embeddings = TypeVar("Embeddings")


def encode_in_chunks(
    encoder: Callable[..., Embeddings], inputs: object, chunk_size: int, *, keep_last: int = 0
) -> Embeddings:
    r"""Return ``encoder(inputs)`` with the activations of one chunk of rows in memory instead of all.

    Every chunk is checkpointed: its activations are dropped after the forward, and computed again when the backward
    reaches it. The loss sees all embeddings at once, and the gradients are those of the whole batch, to rounding:

    .. math:: \frac{dL}{d\theta} = \sum_c \frac{\partial L}{\partial z_c} \frac{\partial z_c}{\partial \theta}

    This costs one more forward of the encoder. Memory beyond inputs and embeddings does not grow with the rows. Random
    states (dropout) and autocast are the same in both forwards of a chunk. Several towers are one encoder that takes
    and returns several tensors, or several calls. Without gradients one chunk is encoded after the other.

    Parameters and mode of the encoder must not change before the backward. Rows must not meet in the encoder:
    `torch.nn.BatchNorm1d` and its relatives in training, which are warned of, take their statistics from a chunk, and
    update the running ones in both forwards. Freeze them by ``eval()``, or use layers that normalise a row.

    Args:
        encoder: a module or a function from rows to embeddings. A ``DistributedDataParallel`` may be the encoder, if
            every rank has as many chunks, or be around a `ChunkedEncoder`, which then synchronises once.
        inputs: a tensor ``[N, ...]`` for ``encoder(inputs)``, a tuple or list for ``encoder(*inputs)``, a mapping (also
            the batches of Hugging Face tokenizers) for ``encoder(**inputs)``. Tensors in it, at any depth, have N rows
            each, or no dimension; None, numbers and strings are the same for every chunk.
        chunk_size: rows of a chunk, at least 1; the last chunk has the rest.
        keep_last: how many of the last chunks keep their activations, which saves their second forward. 1 costs no
            memory at the peak where it is the backward of the encoder that needs most.

    Returns:
        what ``encoder`` returns for all rows: a tensor with N rows, or a tuple, list or mapping of such tensors.

    Raises:
        TypeError: ``chunk_size`` or ``keep_last`` is not an integer, or the inputs or what the encoder returns hold no
            tensor, or something else than the above.
        ValueError: ``chunk_size`` is not positive, ``keep_last`` is negative, inputs have different numbers of rows,
            the encoder returns another number of rows than it was given, or a BatchNorm in training would get a single
            row.

    Warns:
        UserWarning: a BatchNorm in training, by its name in the encoder.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> encoder = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
        >>> z0, z1 = (ck.encode_in_chunks(encoder, torch.randn(1000, 32), chunk_size=256) for _ in range(2))
        >>> ck.nt_xent_loss(z0, z1, temperature=0.1).backward()
        >>> encoder[0].weight.grad.shape
        torch.Size([64, 32])
    """
    if isinstance(inputs, Mapping):
        result = _encode(encoder, (), dict(inputs), chunk_size, keep_last)
    else:
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        result = _encode(encoder, args, {}, chunk_size, keep_last)
    return cast(Embeddings, result)


class ChunkedEncoder(nn.Module):
    """An encoder whose forward holds the activations of one chunk of rows: the module of `encode_in_chunks`.

    It takes the arguments of the encoder and returns what that returns. Its parameters are those of the encoder, under
    names that begin with ``encoder.``.

    Args:
        encoder: a module from rows to embeddings.
        chunk_size: rows of a chunk, at least 1.
        keep_last: how many of the last chunks keep their activations.

    Raises:
        TypeError: as `encode_in_chunks`, also in the forward.
        ValueError: as `encode_in_chunks`, also in the forward.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> encoder = ck.ChunkedEncoder(torch.nn.Linear(32, 16), chunk_size=256)
        >>> encoder(torch.randn(1000, 32)).shape
        torch.Size([1000, 16])
    """

    def __init__(self, encoder: nn.Module, chunk_size: int, keep_last: int = 0) -> None:
        super().__init__()
        _check_options(chunk_size, keep_last)
        self.encoder, self.chunk_size, self.keep_last = encoder, chunk_size, keep_last

    def forward(self, *inputs: Any, **named_inputs: Any) -> Any:
        """Return ``encoder(*inputs, **named_inputs)``."""
        return _encode(self.encoder, inputs, named_inputs, self.chunk_size, self.keep_last)

    def extra_repr(self) -> str:
        """Return the options as ``repr`` shows them."""
        return f"chunk_size={self.chunk_size}, keep_last={self.keep_last}"


def _encode(
    encoder: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any], chunk_size: int, keep_last: int
) -> Any:
    _check_options(chunk_size, keep_last)
    n = _rows((args, named), "inputs", scalars=True)
    # An empty batch is one empty chunk.
    sizes = [min(chunk_size, n - start) for start in range(0, n, chunk_size)] or [0]
    _check_batch_norm(encoder, sizes)

    def encode(chunk: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        return encoder(*chunk[0], **chunk[1])

    parts = []
    for index, (size, chunk) in enumerate(zip(sizes, _split((args, named), sizes), strict=True)):
        keeps = index >= len(sizes) - keep_last
        with _autocast_without_cache():
            part = encode(chunk) if keeps else checkpoint(encode, chunk, use_reentrant=False)
        if (rows := _rows(part, "what the encoder returns")) != size:
            raise ValueError(f"the encoder returned {rows} rows for {size}; it must return one for each of them")
        parts.append(part)
    return _concatenate(parts)


@contextmanager
def _autocast_without_cache() -> Iterator[None]:
    """Let every chunk cast the weights itself: gradients of a shared cast would be added up in half precision."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _check_options(chunk_size: int, keep_last: int) -> None:
    for name, value, least in (("chunk_size", chunk_size, 1), ("keep_last", keep_last, 0)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name} {value} must be at least {least}")


def _modules(encoder: object) -> list[tuple[str, nn.Module]]:
    """Return the modules of a module, of its bound method or of a partial call, with their names."""
    while isinstance(encoder, functools.partial):
        encoder = encoder.func
    module = getattr(encoder, "__self__", encoder)
    return list(module.named_modules()) if isinstance(module, nn.Module) else []


def _check_batch_norm(encoder: object, sizes: list[int]) -> None:
    names = [
        name or type(layer).__name__
        for name, layer in _modules(encoder)
        if isinstance(layer, _BatchNorm) and layer.training
    ]
    if names and 1 in sizes:
        raise ValueError(
            f"a chunk has a single row, of which the BatchNorm {names[0]!r} in training has no statistics; "
            f"choose another chunk_size for {sum(sizes)} rows"
        )
    if names:
        warn(
            f"BatchNorm in training takes its statistics from a chunk, not from the batch, and updates the running "
            f"ones twice: {', '.join(map(repr, names))}. Freeze it by eval(), or use layers that normalise a row."
        )


def _tensors(tree: object, name: str) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list, Mapping)):
        for branch in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _tensors(branch, name)
    elif tree is not None and not isinstance(tree, (bool, int, float, str)):
        raise TypeError(f"{name}: {type(tree).__name__} is neither a tensor nor a tuple, list or mapping of tensors")


def _rows(tree: object, name: str, scalars: bool = False) -> int:
    """Return the number of rows that all tensors of the tree have; a scalar has none, if it may be there."""
    tensors = [x for x in _tensors(tree, name) if x.dim() or not scalars]
    if not tensors:
        raise TypeError(f"{name}: no tensor with rows in it")
    shapes = [tuple(x.shape) for x in tensors]
    if not all(shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"{name}: tensors {', '.join(map(str, shapes))} must have the same number of rows")
    return shapes[0][0]


def _map(function: Callable[[list[Any]], Any], trees: list[Any]) -> Any:
    """Return a tree like the first of `trees`, with what `function` makes of the leaves in the same place."""
    first = trees[0]
    if isinstance(first, Mapping):
        # A copy keeps the class: models read attributes of the batches of Hugging Face, and programs of their outputs.
        result = copy.copy(first) if isinstance(first, MutableMapping) else {}
        for key in first:
            result[key] = _map(function, [tree[key] for tree in trees])
        return result
    if isinstance(first, (tuple, list)):
        branches = [_map(function, list(branch)) for branch in zip(*trees, strict=True)]
        return type(first)(*branches) if hasattr(first, "_fields") else type(first)(branches)
    return function(trees)


def _split(tree: Any, sizes: list[int]) -> Iterator[Any]:
    """Yield the tree of each chunk; its tensors are views."""
    # One split for all chunks: the gradients of single slices would each have the shape of the whole input.
    views = {id(x): x.split(sizes) for x in _tensors(tree, "inputs") if x.dim()}
    for index in range(len(sizes)):

        def chunk(leaves: list[Any], index: int = index) -> Any:
            return views[id(leaves[0])][index] if id(leaves[0]) in views else leaves[0]

        yield _map(chunk, [tree])


def _concatenate(parts: list[Any]) -> Any:
    """Return the tree of all rows."""
    return _map(lambda leaves: cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0], parts)
