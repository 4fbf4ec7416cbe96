"""Primitives, operators and agreement over a process group."""

import time

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import contrastive_kernels as ck
from contrastive_kernels.distributed import set_shards
from contrastive_kernels.engine import groups
from contrastive_kernels.engine.spec import Description, Inputs, Upstream
from tests.support.ranks import Raised

SIZES = [4, 1, 6]
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def batch(d=5):
    torch.manual_seed(1)
    return [torch.randn(11, d, dtype=torch.float64) for _ in range(2)]


def own(x, group):
    return x.split(SIZES)[group.rank()].clone()


# Primitives

IDS = torch.arange(11) % 4
PRIMITIVES = {
    "rows": lambda x, y, ids, bias, cutoff, **o: ck.similarity_logsumexp(x, y, scale=3.0, y_bias=bias, **o),
    "itself": lambda x, y, ids, bias, cutoff, **o: ck.similarity_logsumexp(x, scale=3.0, x_ids=ids, **o),
    "itself biased": lambda x, y, ids, bias, cutoff, **o: ck.similarity_logsumexp(x, y_bias=bias, **o),
    "columns": lambda x, y, ids, bias, cutoff, **o: torch.stack(
        ck.similarity_logsumexp(x, y, scale=3.0, x_ids=ids, y_ids=ids, columns=True, **o)
    ),
    "columns of itself": lambda x, y, ids, bias, cutoff, **o: torch.stack(
        ck.similarity_logsumexp(x, scale=0.3, columns=True, **o)
    ),
    "cutoff": lambda x, y, ids, bias, cutoff, **o: ck.similarity_logsumexp(x, y, cutoff=cutoff, **o),
    "sum": lambda x, y, ids, bias, cutoff, **o: ck.similarity_sum(x, y, term=ck.Softplus(2.0, bias.sum()), **o),
    "sum of itself": lambda x, y, ids, bias, cutoff, **o: ck.similarity_sum(x, term=ck.Band(0.1, 0.9), **o),
}


def primitive_on_a_rank(group, name, limit, backend):
    x, y = (own(v, group).requires_grad_() for v in batch())
    bias, cutoff = own(torch.linspace(-1, 1, 11, dtype=torch.float64), group).requires_grad_(), 0.5
    if name == "sum":
        bias = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    ck.set_workspace_limit(limit)
    out = PRIMITIVES[name](x, y, own(IDS, group), bias, cutoff, group=group, backend=backend)
    out.square().sum().backward()
    ck.set_workspace_limit(None)
    return out.detach(), [torch.zeros_like(v) if v.grad is None else v.grad for v in (x, y, bias)]


@pytest.mark.parametrize("limit", [None, 1], ids=["whole", "slices"])
@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive(ranks, name, limit, backend):
    """Results belong to this rank's rows and columns; gradients are those of the sum over the ranks."""
    x, y = (v.requires_grad_() for v in batch())
    bias = torch.linspace(-1, 1, 11, dtype=torch.float64).requires_grad_()
    if name == "sum":
        bias = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    out = PRIMITIVES[name](x, y, IDS, bias, 0.5, backend="torch")
    out.square().sum().backward()
    found = ranks.run(3, primitive_on_a_rank, name, limit, backend)
    torch.testing.assert_close(torch.cat([v for v, _ in found], -1), out.detach(), **EXACT)
    for k, tensor in enumerate((x, y, bias)):
        parts = [grads[k] for _, grads in found]
        whole = sum(parts) if name == "sum" and k == 2 else torch.cat(parts)
        torch.testing.assert_close(whole, torch.zeros_like(tensor) if tensor.grad is None else tensor.grad, **EXACT)


def select_on_a_rank(group, k, largest, limit, itself):
    x, y = (own(v.round(), group) for v in batch(2))
    ids = own(IDS, group)
    ck.set_workspace_limit(limit)
    options = {"x_ids": ids} if itself else {"x_ids": ids, "y_ids": ids, "exclude_diagonal": True}
    found = ck.row_select(x, None if itself else y, k, largest=largest, **options, group=group)
    ck.set_workspace_limit(None)
    return found


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("limit", [None, 1], ids=["whole", "slices"])
@pytest.mark.parametrize(("k", "largest"), [(1, True), (3, False), (20, True)])
def test_selection(ranks, k, largest, limit, itself):
    """Columns are numbered rank after rank; equal similarities, of which there are many here, go to the lowest."""
    x, y = (v.round() for v in batch(2))
    options = {"x_ids": IDS} if itself else {"x_ids": IDS, "y_ids": IDS, "exclude_diagonal": True}
    expected = ck.row_select(x, None if itself else y, k, largest=largest, **options)
    found = zip(*ranks.run(3, select_on_a_rank, k, largest, limit, itself), strict=True)
    for parts, whole in zip(found, expected, strict=True):
        assert torch.equal(torch.cat(parts), whole)


# Agreement

DIFFERENCES = {
    "function": (lambda x, y, rank, **o: (ck.clip_loss if rank else ck.siglip_loss)(x, y, 3.0, **o)),
    "image_features": (lambda x, y, rank, **o: ck.clip_loss(x[:, : 5 - rank], y[:, : 5 - rank], 3.0, **o)),
    "text_features": (lambda x, y, rank, **o: ck.clip_loss(x, y[rank:] if rank == 2 else y, 3.0, **o)),
    "torch.float32": (lambda x, y, rank, **o: ck.clip_loss(*((x, y) if rank else (x.float(), y.float())), 3.0, **o)),
    "requires_grad": (lambda x, y, rank, **o: ck.clip_loss(x.clone().requires_grad_(rank == 1), y, 3.0, **o)),
    "label_smoothing": (lambda x, y, rank, **o: ck.clip_loss(x, y, 3.0, label_smoothing=0.1 * rank, **o)),
    "weight": (lambda x, y, rank, **o: ck.clip_loss(x, y, 3.0, weight=x[:, 0] if rank else None, **o)),
    "empty": (lambda x, y, rank, **o: ck.clip_loss(*((x[:0], y[:0]) if rank == 1 else (x, y)), 3.0, **o)),
}


def difference_on_a_rank(group, name):
    x, y = (own(v, group) for v in batch())
    start = time.monotonic()
    try:
        DIFFERENCES[name](x, y, group.rank(), group=group)
        error = ("none", "")
    except (RuntimeError, ValueError) as raised:
        error = type(raised).__name__, str(raised)
    seconds = time.monotonic() - start
    return error, seconds, ck.clip_loss(x, y, 3.0, group=group)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_differ_raise_the_same_error(ranks, name):
    """On all of them, at once, and the group serves the next loss."""
    errors, seconds, losses = zip(*ranks.run(3, difference_on_a_rank, name), strict=True)
    assert len(set(errors)) == 1
    kind, text = errors[0]
    assert kind == ("ValueError" if name == "empty" else "RuntimeError")
    assert name in text
    assert "rank" in text
    assert max(seconds) < 10
    torch.testing.assert_close(torch.stack(losses).mean(), ck.clip_loss(*batch(), 3.0), **EXACT)


def refused_on_a_rank(group, what):
    x, y = (own(v, group).requires_grad_() for v in batch())
    if what == "dtensor":
        mesh = init_device_mesh("cpu", (3,))
        return ck.nt_xent_loss(DTensor.from_local(x.detach()[:1], mesh), y, group=group)
    if what == "mmcl":
        return ck.mmcl_loss(x, y, group=group)
    (grad,) = torch.autograd.grad(ck.nt_xent_loss(x, y, group=group), x, create_graph=True)
    return grad.square().sum().backward()


@pytest.mark.parametrize(("what", "message"), [("mmcl", "gather"), ("second", "second derivatives")])
def test_what_is_not_there_is_refused(ranks, what, message):
    for raised in ranks.outcomes(3, refused_on_a_rank, what):
        assert isinstance(raised, Raised)
        assert raised.kind == "NotImplementedError"
        assert message in raised.text


def test_distributed_tensors_are_refused(ranks):
    for raised in ranks.outcomes(3, refused_on_a_rank, "dtensor"):
        assert raised.kind == "TypeError"
        assert "to_local()" in raised.text


def test_a_group_that_is_none_is_refused():
    x, y = batch()
    for group, error in ((7, TypeError), ("everyone", ValueError), ("world", RuntimeError)):
        with pytest.raises(error, match="group"):
            ck.clip_loss(x, y, 3.0, group=group)


def even_on_a_rank(group):
    x, y = (v.split([4, 4, 3])[group.rank()][:3] for v in batch())
    set_shards("even")
    promised = ck.nt_xent_loss(x, y, group=group)
    set_shards(None)
    return promised, ck.nt_xent_loss(x, y, group=group)


def test_even_shards(ranks):
    """A promise of equal shards gives the loss that an exchange does."""
    for promised, exchanged in ranks.run(3, even_on_a_rank):
        assert torch.equal(promised, exchanged)
    with pytest.raises(ValueError, match="mode 'odd' is unknown"):
        set_shards("odd")


# Operators


def opcheck_on_a_rank(group, itself):
    """A group of one process is enough for what opcheck tests."""
    x, y = (v[:4].clone().requires_grad_() for v in batch())
    ids, scale = torch.arange(4), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    inputs = Inputs(x, None if itself else y, scale, None, ids, None if itself else ids, None, None, None)
    what = Description((1.0,), not itself, "", (), False, 0)
    of_group = ["torch", group.group_name, [4], 1 << 20]
    operators = torch.ops.contrastive_kernels
    torch.library.opcheck(operators.group_sweep.default, (*inputs, *what, True, *of_group))
    lse = operators.group_sweep(*inputs, *what, False, *of_group)
    detached = Inputs(*(v.detach() if isinstance(v, torch.Tensor) else v for v in inputs))
    upstream = Upstream(torch.ones(1, 4).double(), torch.ones(len(lse[1])).double(), lse[2].detach(), *lse[:2])
    upstream = Upstream(*(v.detach() for v in upstream))
    wanted = [True, not itself, True, False, False, False, False]
    torch.library.opcheck(operators.group_sweep_backward.default, (*upstream, *detached, *what, wanted, *of_group))
    torch.library.opcheck(operators.group_sum.default, (x, group.group_name))
    arguments = (x, ids, ids, group.group_name, [4], [4], 1 << 20)
    torch.library.opcheck(operators.group_class_sums.default, arguments)
    return True


@pytest.mark.parametrize("itself", [False, True])
def test_opcheck(ranks, itself):
    assert ranks.run(1, opcheck_on_a_rank, itself) == [True]


# Memory


def slices_on_a_rank(group, limit):
    y = own(torch.randn(11, 8, dtype=torch.float64), group)
    peers = groups.Peers(group.group_name, tuple(SIZES), limit)
    row_bytes = 3 * 8 * 8
    return [(start, stop, rows.shape) for start, stop, rows in groups._slices(y, peers, row_bytes)][1:]


@pytest.mark.parametrize("limit", [1, 3 * 3 * 8 * 8 * 2, 1 << 20])
def test_slices_take_what_the_limit_allows(ranks, limit):
    """Every rank has the same slices, which cover the longest shard; one row of every rank is always taken."""
    found = ranks.run(3, slices_on_a_rank, limit)
    assert found[0] == found[1] == found[2]
    starts, stops, shapes = zip(*found[0], strict=True)
    assert (starts[0], stops[-1]) == (0, max(SIZES))
    assert starts[1:] == stops[:-1]
    assert max(shape[1] for shape in shapes) == min(max(SIZES), max(1, limit // (3 * 3 * 8 * 8)))


def transfers_on_a_rank(group):
    """Return how often gradients of other ranks' rows go home: of x with itself, and of x with y."""
    x, y = (own(v, group).requires_grad_() for v in batch())
    home, counts = groups._sum_at_owners, []
    for loss in (ck.nt_xent_loss, ck.info_nce_loss):
        calls = []
        groups._sum_at_owners = lambda *a, calls=calls: calls.append(a) or home(*a)
        loss(x, y, group=group).backward()
        counts.append(len(calls))
    groups._sum_at_owners = home
    return counts


def test_no_gradient_travels_of_rows_with_themselves(ranks):
    assert ranks.run(3, transfers_on_a_rank) == [[0, 1]] * 3
