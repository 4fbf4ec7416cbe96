"""Write your own loss from the primitives: InfoNCE corrected for the popularity of the items.

A recommender draws its negatives from the batch, so a popular item is a negative far more often than a rare one, and a
plain InfoNCE learns to avoid it. The correction of Yi et al. (RecSys 2019) subtracts the logarithm of an item's
frequency q from its logit:

    u_ij = <user_i, item_j> / T - log q_j,    L = mean_i [ log sum_j exp(u_ij) - u_ii ]

where other rows with the item of user i are no negatives. ``python -m examples.own_loss`` checks value and gradients
against the dense formula and measures the memory of both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import contrastive_kernels as ck
from benchmarks.measure import MIB, Step, peak_extra_mib


def popularity_loss(users: Tensor, items: Tensor, log_q: Tensor, item_ids: Tensor, temperature: Tensor) -> Tensor:
    """Return the corrected InfoNCE; autograd gives the gradients of all four floating inputs."""
    positive = (users * items).sum(1) / temperature - log_q
    negatives = ck.similarity_logsumexp(
        users, items, scale=1 / temperature, y_bias=-log_q, x_ids=item_ids, y_ids=item_ids
    )
    # Equal ids drop the positive too; log(e^p + e^n) - p = softplus(n - p) adds it again without cancellation.
    return F.softplus(negatives - positive).mean()


def dense_popularity_loss(users: Tensor, items: Tensor, log_q: Tensor, item_ids: Tensor, temperature: Tensor) -> Tensor:
    """Return the same loss as the formula says, with the N x N matrix."""
    logits = users @ items.T / temperature - log_q
    others = ~torch.eye(len(users), dtype=torch.bool)
    same_item = item_ids[:, None] == item_ids
    return F.cross_entropy(logits.masked_fill(same_item & others, -torch.inf), torch.arange(len(users)))


class Batch(NamedTuple):
    """The arguments of the loss; all but the integer ``item_ids`` require gradients."""

    users: Tensor
    items: Tensor
    log_q: Tensor
    item_ids: Tensor
    temperature: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors that require gradients, by name."""
        return {name: value for name, value in self._asdict().items() if value.requires_grad}


def make_batch(n: int, dim: int = 64, catalogue: int = 1000, dtype: torch.dtype = torch.float32) -> Batch:
    """Return random unit features of n users and their items; by Zipf's law popular items repeat."""
    frequency = 1 / torch.arange(1, catalogue + 1, dtype=dtype)
    frequency /= frequency.sum()
    item_ids = torch.multinomial(frequency, n, replacement=True)
    users, items = (F.normalize(torch.randn(rows, dim, dtype=dtype), dim=1) for rows in (n, catalogue))
    batch = Batch(users, items[item_ids], frequency.log()[item_ids], item_ids, torch.tensor(0.1, dtype=dtype))
    for name in ("users", "items", "log_q", "temperature"):
        getattr(batch, name).requires_grad_()
    return batch


def largest_difference(n: int) -> dict[str, float]:
    """Return the largest relative differences of the fused from the dense loss and gradients, in float64."""
    batch = make_batch(n, dtype=torch.float64)
    results = []
    for loss_of in (popularity_loss, dense_popularity_loss):
        loss = loss_of(*batch)
        gradients = torch.autograd.grad(loss, list(batch.leaves().values()))
        results.append([loss.detach(), *gradients])
    names = ["loss", *(f"gradient of {name}" for name in batch.leaves())]
    return {
        name: float((fused - dense).abs().max() / dense.abs().max())
        for name, fused, dense in zip(names, *results, strict=True)
    }


def peak_mib(loss_of: Callable[..., Tensor], batch: Batch) -> float:
    """Return the peak memory of forward and backward beyond inputs and gradients, in MiB."""
    leaves = batch.leaves()
    step = Step(
        lambda: loss_of(*batch),
        lambda loss: dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)),
    )
    return peak_extra_mib(step, torch.device("cpu"))


def main(arguments: Sequence[str] | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """Check the loss and measure its memory; print and return the differences and the peaks in MiB."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=8192, help="rows N at which memory is measured (default 8192)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)

    differences = largest_difference(512)
    print("largest relative difference from the dense formula, float64, N = 512")
    for name, difference in differences.items():
        print(f"  {name:<24}{difference:.1e}")

    batch = make_batch(options.size)
    one_matrix = options.size**2 * batch.users.itemsize / MIB
    losses = {"ours": popularity_loss, "dense": dense_popularity_loss}
    peaks = {name: peak_mib(loss_of, batch) for name, loss_of in losses.items()}
    print(f"peak memory of forward + backward, float32, N = {options.size:,} (one N x N matrix: {one_matrix:,.0f} MiB)")
    for name, peak in peaks.items():
        print(f"  {name:<24}{peak:,.1f} MiB")
    return differences, peaks


if __name__ == "__main__":
    main()
