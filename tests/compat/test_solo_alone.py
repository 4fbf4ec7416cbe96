"""The functions of solo-learn beside dense formulas, in one process and on three."""

import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import python_ref
from contrastive_kernels.compat import _small, solo
from tests.support import adapters

ROWS = 2048
EXACT = {"rtol": 1e-10, "atol": 1e-12}
each_path = pytest.mark.parametrize("largest", [0, _small._largest], ids=["sweep", "formula"])


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def simclr(anchors, z, indexes, temperature=0.1):
    """Return the losses of some rows among all rows z."""
    logits = unit(z)[anchors] @ unit(z).T / temperature
    others = anchors[:, None] != torch.arange(len(z))
    same = (indexes[anchors][:, None] == indexes) & others
    terms = logits.exp()
    return ((terms * others).sum(1) / (terms * same).sum(1)).log()


def barlow(correlation, lamb=5e-3, scale_loss=0.025):
    squares = (correlation - torch.eye(len(correlation))).square()
    diagonal = squares.diagonal().sum()
    return scale_loss * (diagonal + lamb * (squares.sum() - diagonal))


def correlation(z1, z2):
    z1, z2 = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z1, z2))
    return z1.T @ z2 / len(z1)


def spread(z, var_weight=25.0, cov_weight=1.0):
    covariance = z.T.cov()
    hinge = (1 - (covariance.diagonal() + 1e-4).sqrt()).relu().mean()
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return var_weight * hinge + cov_weight * off_diagonal / z.shape[1]


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


@each_path
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32])
def test_any_positives(largest, dtype):
    """Rows of one index are positives of each other, several at once; -1 is an index."""
    z = torch.randn(60, 5, dtype=torch.float64, requires_grad=True)
    indexes = (torch.arange(60) % 7 - 1).to(dtype)
    expected = simclr(torch.arange(60), z, indexes, 0.3).mean()
    with _small.largest(largest):
        loss = solo.simclr_loss_func(z, indexes, 0.3)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(gradients(loss, z), gradients(expected, z), **EXACT)


@each_path
def test_without_positives(largest):
    """A row without a positive makes the mean infinite; a single row has no pair, and NaN as from the peer."""
    with _small.largest(largest):
        assert solo.simclr_loss_func(torch.randn(5, 4), torch.tensor([0, 0, 1, 1, 2])) == torch.inf
        assert solo.simclr_loss_func(torch.randn(1, 4), torch.tensor([0])).isnan()


@pytest.mark.parametrize("n", [40, 300])
def test_small_temperature(n):
    """Exponentials of single similarities leave the range of float32: the loss is the true one."""
    z, indexes = torch.randn(n, 8), torch.arange(n // 2).repeat(2)
    exact = simclr(torch.arange(n), z.double(), indexes, 0.004).mean()
    torch.testing.assert_close(solo.simclr_loss_func(z, indexes, 0.004).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "temperature", [torch.tensor(0.3), torch.tensor([0.3], dtype=torch.float64), np.float32(0.3), torch.tensor(2), 1]
)
def test_temperatures(temperature):
    z1, z2, queue = torch.randn(3, 12, 4, dtype=torch.float64)
    indexes = torch.arange(6).repeat(2)
    for largest in (0, _small._largest):
        with _small.largest(largest):
            for found, expected in (
                (
                    solo.simclr_loss_func(z1, indexes, temperature),
                    solo.simclr_loss_func(z1, indexes, float(temperature)),
                ),
                (solo.mocov3_loss_func(z1, z2, temperature), solo.mocov3_loss_func(z1, z2, float(temperature))),
                (
                    solo.ressl_loss_func(z1, z2, queue, temperature, temperature),
                    solo.ressl_loss_func(z1, z2, queue, float(temperature), float(temperature)),
                ),
            ):
                torch.testing.assert_close(found.squeeze(), expected, **EXACT)


@each_path
def test_reference(largest):
    """The losses that this package has too are those of the reference."""
    x, y, queue = torch.randn(3, 9, 5, dtype=torch.float64)
    with _small.largest(largest):
        found = (
            solo.simclr_loss_func(torch.cat([x, y]), torch.arange(9).repeat(2), 0.2),
            solo.mocov2plus_loss_func(x, y, queue.T, 0.2),
            solo.mocov3_loss_func(x, y),
            solo.nnclr_loss_func(x, y, 0.3),
            solo.barlow_loss_func(x, y),
            solo.vicreg_loss_func(x, y),
        )
    expected = (
        python_ref.nt_xent_loss(x, y, temperature=0.2),
        python_ref.moco_loss(x, y, queue, temperature=0.2, normalize=False),
        0.4 * python_ref.info_nce_loss(x, y, temperature=0.2),
        python_ref.info_nce_loss(x, y, temperature=0.3),
        0.025 * python_ref.barlow_twins_loss(x, y, lambd=5e-3),
        python_ref.vicreg_loss(x, y, var_weight=50.0),
    )
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, **EXACT)


def test_other_names_need_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "solo.losses", None)
    with pytest.raises(ImportError, match="pip install solo-learn"):
        _ = solo.byol_loss_func


@each_path
def test_no_rows(largest):
    """They have no mean."""
    x, queue = torch.randn(0, 4, requires_grad=True), torch.randn(6, 4)
    with _small.largest(largest):
        for loss in (
            solo.simclr_loss_func(x, torch.zeros(0, dtype=torch.int64)),
            solo.mocov2plus_loss_func(x, x, queue.T),
            solo.mocov3_loss_func(x, x),
            solo.nnclr_loss_func(x, x),
            solo.ressl_loss_func(x, x, queue),
            solo.barlow_loss_func(x, x),
            solo.vicreg_loss_func(x, x),
        ):
            assert loss.isnan() and gradients(loss, x)[0].shape == (0, 4)


@each_path
def test_beside_another_default_device(largest):
    """What a loss makes is where the rows are."""
    x, y = torch.randn(2, 6, 4)
    with _small.largest(largest), torch.device("meta"):
        found = solo.mocov2plus_loss_func(x, y, y.T), solo.mocov3_loss_func(x, y), solo.nnclr_loss_func(x, y)
    expected = solo.mocov2plus_loss_func(x, y, y.T), solo.mocov3_loss_func(x, y), solo.nnclr_loss_func(x, y)
    torch.testing.assert_close(found, expected)


def test_views_of_two_dtypes():
    """VICReg takes them, as the peer does."""
    z1, z2 = torch.randn(2, 6, 4)
    expected = solo.vicreg_loss_func(z1.double(), z2.double())
    torch.testing.assert_close(solo.vicreg_loss_func(z1.double(), z2), expected)


def test_single_row():
    assert solo.vicreg_loss_func(torch.randn(1, 4), torch.randn(1, 4)).isnan()
    with pytest.raises(ValueError, match="2 rows"):
        solo.barlow_loss_func(torch.randn(1, 4), torch.randn(1, 4))


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="indexes"):
        solo.simclr_loss_func(torch.randn(6, 4), torch.arange(5))
    with pytest.raises(ValueError, match="z2"):
        solo.simclr_loss_func(torch.randn(6, 4), torch.randn(5, 4))
    with pytest.raises(ValueError, match="z1"):
        solo.vicreg_loss_func(torch.randn(6, 4), torch.randn(5, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """The losses are float32 and those of the rounded rows."""
    x, y, queue = (unit(torch.randn(40, 8)).to(dtype) for _ in range(3))
    for found, exact in (
        (solo.nnclr_loss_func(x, y), solo.nnclr_loss_func(x.double(), y.double())),
        (solo.mocov2plus_loss_func(x, y, queue.T), solo.mocov2plus_loss_func(x.double(), y.double(), queue.T.double())),
        (solo.ressl_loss_func(x, y, queue), solo.ressl_loss_func(x.double(), y.double(), queue.double())),
        (solo.vicreg_loss_func(x, y), solo.vicreg_loss_func(x.double(), y.double())),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=5e-3, atol=0)


def of_rows(name, z1, z2, queue):
    """Return a loss as a function of two tensors and a queue would call it."""
    if name == "simclr":
        return solo.simclr_loss_func(torch.cat([z1, z2]), torch.arange(len(z1)).repeat(2))
    if name in ("mocov2plus", "ressl"):
        return getattr(solo, f"{name}_loss_func")(z1, z2, queue.T if name == "mocov2plus" else queue)
    return getattr(solo, f"{name}_loss_func")(z1, z2)


NAMES = ("simclr", "mocov2plus", "mocov3", "nnclr", "ressl", "barlow", "vicreg")


@pytest.mark.parametrize("name", NAMES)
def test_compiles(name):
    inputs = torch.randn(3, 12, 5)
    compiled = torch.compile(of_rows, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(name, *inputs), of_rows(name, *inputs))


@pytest.mark.parametrize("name", ["simclr", "mocov3", "barlow"])
def test_no_matrix(name):
    z1, z2 = torch.randn(2, ROWS // 2 if name == "simclr" else ROWS, 8).requires_grad_()
    with adapters.NoMatrix(ROWS):
        of_rows(name, z1, z2, None).backward()


def on_rank(group, name, batch):
    """Return the loss of this rank's rows of a batch (ranks, 2, n, D) and their gradient."""
    rows = batch[dist.get_rank()].clone().requires_grad_()
    z1, z2 = rows
    if name == "simclr":
        indexes = torch.arange(len(z1)).repeat(2) + len(z1) * (
            dist.get_rank() // 2
        )  # ranks 0 and 1 share their samples
        loss = solo.simclr_loss_func(rows.flatten(0, 1), indexes)
    elif name == "simclr of labels":
        labels = torch.tensor([0.5, -1.0]).repeat_interleave(len(z1))
        loss = solo.simclr_loss_func(rows.flatten(0, 1), labels)
    else:
        loss = of_rows(name, z1, z2, batch[0, 0])
    loss.backward()
    return loss.detach(), rows.grad


def expected_on_ranks(name, batch):
    """Return the losses of all ranks, and the gradient of each rank's rows that its optimiser should see."""
    w, _, n, _ = batch.shape
    rows = batch.clone().requires_grad_()
    places = torch.arange(w * n).view(w, n)
    losses = []
    if name.startswith("simclr"):
        z = rows.flatten(0, 2)
        of_rank = torch.arange(w)[:, None] // 2 * n
        indexes = (torch.arange(n).repeat(2) + of_rank).flatten()
        if name == "simclr of labels":
            indexes = torch.tensor([0.5, -1.0]).repeat_interleave(n).repeat(w)
        losses = [simclr(torch.arange(2 * n) + 2 * n * r, z, indexes).mean() for r in range(w)]
    elif name in ("mocov3", "nnclr"):
        temperature, factor = (0.2, 0.4) if name == "mocov3" else (0.1, 1.0)
        keys = unit(rows[:, 1].flatten(0, 1))
        keys = keys.detach() if name == "mocov3" else keys
        for r in range(w):
            losses.append(factor * F.cross_entropy(unit(rows[r, 0]) @ keys.T / temperature, places[r]))
    elif name == "barlow":
        parts = [correlation(*rows[r]) for r in range(w)]
        for r in range(w):
            others = sum(part.detach() for q, part in enumerate(parts) if q != r)
            losses.append(barlow((parts[r] + others) / w))
    elif name == "vicreg":
        of_all = sum(spread(rows[:, view].flatten(0, 1)) for view in range(2))
        losses = [25 * F.mse_loss(*rows[r]) + of_all for r in range(w)]
    else:  # queues: nothing is gathered
        losses = [of_rows(name, *rows[r], batch[0, 0]) for r in range(w)]
    (grad,) = torch.autograd.grad(sum(losses), rows)
    return losses, grad


@pytest.mark.parametrize("name", [*NAMES, "simclr of labels"])
def test_ranks(ranks, name):
    """Values and gradients with a process group: of all ranks' losses, but for Barlow Twins and the keys of MoCo."""
    batch = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    losses, grads = expected_on_ranks(name, batch)
    for (loss, grad), own_loss, own_grad in zip(ranks.run(3, on_rank, name, batch), losses, grads, strict=True):
        torch.testing.assert_close(loss, own_loss.detach(), **EXACT)
        torch.testing.assert_close(grad, own_grad, **EXACT)


def test_group_of_one():
    """Keys that are gathered have no gradient, also those of a single rank."""
    query, key = torch.randn(2, 6, 4, dtype=torch.float64).unbind()
    expected = solo.mocov3_loss_func(query, key)
    key.requires_grad_(), query.requires_grad_()
    assert solo.mocov3_loss_func(query, key).requires_grad
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        loss = solo.mocov3_loss_func(query, key)
        grads = torch.autograd.grad(loss, (query, key), allow_unused=True)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(loss, expected, **EXACT)
    assert grads[0].any() and grads[1] is None
