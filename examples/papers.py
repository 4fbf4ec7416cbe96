"""Four small experiments that compare predictions of the papers with measurements.

- ``spectral``: minibatches of the spectral contrastive loss lead to the eigenvalues of the augmentation graph
  (HaoChen, Wei, Gaidon, Ma, NeurIPS 2021);
- ``robustness``: an encoder with a small alignment loss fails under one of its augmentations, the reason for the
  minimum over views in ArCL (Zhao, Du, Wang, Yao, Huang, ICLR 2023);
- ``polarization``: the regulariser empties the band of ambiguous distances (Chen, Niu, Gong, Li, Yang, Sugiyama, ICML
  2021);
- ``false_negatives``: the debiased loss is close to the loss without false negatives (Chuang et al., NeurIPS 2020), and
  hardness weights put more of the gradient on false negatives (Robinson et al., ICLR 2021).

``python -m examples.papers`` runs them all in less than a minute.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import contrastive_kernels as ck

# How far a measured number may be from the predicted one: relative, and absolute where the prediction is 0.
TOLERANCE, TOLERANCE_OF_ZERO = 0.1, 0.02


class Finding(NamedTuple):
    """A quantity, predicted (a number or a relation like ``"> 1"``) and measured."""

    quantity: str
    predicted: str | float
    measured: float

    @property
    def tolerance(self) -> float | None:
        """How far the measured number may be from the predicted one; None for a relation."""
        if isinstance(self.predicted, str):
            return None
        return TOLERANCE * abs(self.predicted) or TOLERANCE_OF_ZERO

    @property
    def holds(self) -> bool:
        """Whether the measurement is as predicted."""
        if isinstance(self.predicted, str):
            relation, bound = self.predicted.split()
            return self.measured > float(bound) if relation == ">" else self.measured < float(bound)
        return abs(self.measured - self.predicted) <= (self.tolerance or 0.0)


def augmentation_graph(images: int, nodes: int) -> Tensor:
    """Return p(x, x') of two augmentations of a random image; most augmentations are among a few nodes of the image."""
    own = torch.arange(nodes) % images == torch.arange(images)[:, None]
    augmentation = torch.rand(images, nodes, dtype=torch.float64) * torch.where(own, 1.0, 0.05)
    augmentation /= augmentation.sum(1, keepdim=True)
    return augmentation.T @ augmentation / images


def spectral(steps: int) -> Iterator[Finding]:
    """Train one free vector per node on sampled positive pairs; compare the spectrum with that of the graph."""
    nodes, dim, batch = 24, 4, 2048
    joint = augmentation_graph(6, nodes)
    marginal = joint.sum(1)
    eigenvalues = torch.linalg.eigvalsh(joint / (marginal[:, None] * marginal).sqrt()).flip(0)
    features = (0.1 * torch.randn(nodes, dim)).requires_grad_()
    optimizer = torch.optim.Adam([features], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        pairs = torch.multinomial(joint.flatten(), batch, replacement=True)
        loss = ck.spectral_contrastive_loss(features[pairs // nodes], features[pairs % nodes])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    products = (features @ features.T).detach().double()
    population = -2 * (joint * products).sum() + (marginal[:, None] * marginal * products**2).sum()
    yield Finding("population loss after training: -sum of the squares of the 4 largest eigenvalues",
                  -float((eigenvalues[:dim] ** 2).sum()), float(population))  # fmt: skip
    features = features.detach()
    learned = torch.linalg.eigvalsh(
        (features * marginal.sqrt()[:, None].float()).T @ (features * marginal.sqrt()[:, None].float())
    )
    for k in range(dim):
        yield Finding(
            f"eigenvalue {k + 1} of the graph, from the features", float(eigenvalues[k]), float(learned[-1 - k])
        )


def robustness(steps: int) -> Iterator[Finding]:
    """Encode f(x) = x_1 + sqrt(eps) / 2 x_2; augmentations multiply x_2 by theta ~ N(0, 1), labels are sign(x_1)."""
    epsilon, samples = 0.04, 400 * steps
    x = torch.randn(samples, 2, dtype=torch.float64)

    def encode(theta: Tensor | float) -> Tensor:
        return x[:, :1] + math.sqrt(epsilon) / 2 * theta * x[:, 1:]

    def views(count: int) -> Tensor:
        return torch.stack([encode(torch.randn(samples, 1, dtype=torch.float64)) for _ in range(count)], 1)

    yield Finding("alignment loss of two views: eps / 2", epsilon / 2, float(ck.alignment_loss(views(2))))
    for theta, risk in ((0.0, 0.0), (2 / math.sqrt(epsilon), 0.25)):
        wrong = encode(theta).sign() != x[:, :1].sign()
        yield Finding(f"classification error where theta = {theta:g}", risk, float(wrong.double().mean()))
    worst = [float(ck.augmentation_robust_loss(views(count))) for count in (2, 8)]
    yield Finding("robust loss of 8 views over that of 2: more than 1", "> 1", worst[1] / worst[0])


def polarization(steps: int) -> Iterator[Finding]:
    """Train free features with NT-Xent, without and with the regulariser; compare their distances."""
    band = ck.Polarization(lower=0.1, upper=0.45, weight=20.0)
    start, noise = torch.randn(256, 8), 0.3 * torch.randn(2, 256, 8)

    def shares(regulariser: ck.Polarization | None) -> Tensor:
        """Return the shares of the pairs whose final distance is below, inside and above the band."""
        points = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([points], lr=0.05)
        for _ in range(2 * steps):
            loss = ck.nt_xent_loss(points + noise[0], points + noise[1], temperature=0.5, polarization=regulariser)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        z = F.normalize(points.detach(), dim=1)
        distance = (1 - (z @ z.T)[~torch.eye(256, dtype=torch.bool)]) / 2
        return torch.bucketize(distance, torch.tensor([band.lower, band.upper])).bincount(minlength=3) / len(distance)

    without, with_it = shares(None), shares(band)
    ratio = float(with_it[1] / without[1])
    yield Finding("pairs inside the band (0.1, 0.45), with the regulariser over without: less than 1", "< 1", ratio)
    yield Finding("two modes: pairs nearer than the band, of all pairs", "> 0", float(with_it[0]))
    yield Finding("two modes: pairs farther than the band, of all pairs", "> 0", float(with_it[2]))


def false_negatives(steps: int) -> Iterator[Finding]:
    """Compare, for fixed features of eight classes, the bias of the losses and the gradient on pairs of one class."""
    classes, samples, temperature = 8, 8 * steps, 0.5
    labels = torch.arange(samples) % classes
    centres = F.normalize(torch.randn(classes, 32), dim=1)
    z0, z1 = F.normalize(centres[labels] + 0.15 * torch.randn(2, samples, 32), dim=-1)
    z, ids, instances = torch.cat([z0, z1]), labels.repeat(2), torch.arange(samples).repeat(2)

    positive = (z0 * z1).sum(1).repeat(2) / temperature
    true = ck.similarity_logsumexp(z, scale=1 / temperature, x_ids=ids) + math.log(classes / (classes - 1))
    unbiased = F.softplus(true - positive).mean()
    biased = ck.nt_xent_loss(z0, z1, temperature=temperature)
    debiased = ck.debiased_loss(z0, z1, temperature=temperature, tau_plus=1 / classes)
    ratio = float((debiased - unbiased).abs() / (biased - unbiased).abs())
    yield Finding("distance to the loss without false negatives, debiased over NT-Xent: less than 1", "< 1", ratio)

    def share(scale: float) -> Tensor:
        """Return the share of the pairs of one class in sum exp(scale * s)."""
        every = ck.similarity_logsumexp(z, scale=scale, x_ids=instances)
        return -torch.expm1(ck.similarity_logsumexp(z, scale=scale, x_ids=ids) - every)

    plain = share(1 / temperature).mean()
    for beta in (0.5, 1.0):
        hard = ((1 + beta) * share((1 + beta) / temperature) - beta * share(beta / temperature)).mean()
        quantity = f"share of the repulsion on false negatives, beta = {beta} over beta = 0: more than 1"
        yield Finding(quantity, "> 1", float(hard / plain))


EXPERIMENTS: dict[str, Callable[[int], Iterator[Finding]]] = {
    "spectral": spectral, "robustness": robustness, "polarization": polarization, "false_negatives": false_negatives
}  # fmt: skip


HOLDS, FAILS, ALLOWED, INK = "#0072B2", "#D55E00", "#d8d8d8", "#222222"


def draw(found: Mapping[str, Sequence[Finding]], caption: str, file: Path) -> None:
    """Draw every measurement beside what is allowed by its prediction, in units of the prediction or of the bound."""
    findings = [(name, finding) for name, group in found.items() for finding in group]
    figure, axes = plt.subplots(figsize=(11, 1.3 + 0.42 * len(findings)))
    for place, (_, finding) in enumerate(findings):
        if isinstance(finding.predicted, str):
            relation, text = finding.predicted.split()
            unit, bound = float(text) or 1.0, 1.0 if float(text) else 0.0
            allowed = (bound, 9.0) if relation == ">" else (-9.0, bound)
        else:
            unit = abs(finding.predicted) or 1.0
            centre, half = finding.predicted / unit, (finding.tolerance or 0.0) / unit
            allowed = (centre - half, centre + half)
        axes.barh(place, allowed[1] - allowed[0], 0.7, allowed[0], color=ALLOWED, zorder=1)
        color = HOLDS if finding.holds else FAILS
        axes.plot(finding.measured / unit, place, "o", color=color, markersize=6, zorder=3)
    axes.set_yticks(range(len(findings)), [f"{name}: {finding.quantity}" for name, finding in findings], fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlim(-1.4, 2.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("measured, in units of the prediction (of 1 where that is 0); grey: what it allows", fontsize=8.5)
    figure.suptitle(
        f"Predictions of the papers and measurements ({caption})", x=0.01, ha="left", fontsize=11, color=INK
    )
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Finding]]:
    """Run the experiments, print and return their findings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument(
        "--steps", type=int, default=500, help="length of the training, size of the samples (default 500)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the picture")
    options = parser.parse_args(arguments)
    found = {}
    for name in options.only:
        torch.manual_seed(options.seed)
        found[name] = list(EXPERIMENTS[name](options.steps))
    table = Table("experiment", "quantity", "predicted", "measured", "tolerance", "verdict")
    for name, findings in found.items():
        for k, finding in enumerate(findings):
            table.add_row(
                name if k == 0 else "",
                finding.quantity,
                finding.predicted if isinstance(finding.predicted, str) else f"{finding.predicted:.4f}",
                f"{finding.measured:.4f}",
                "" if finding.tolerance is None else f"± {finding.tolerance:.4f}",
                "holds" if finding.holds else "does not hold",
                end_section=k + 1 == len(findings),
            )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    file = options.output / "papers.png"
    draw(found, f"seed {options.seed}, {options.steps} steps, torch {torch.__version__}", file)
    console.print(f"Written: {file}", highlight=False)
    return found


if __name__ == "__main__":
    main()
