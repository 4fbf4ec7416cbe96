"""Primitives, operators and agreement over a process group."""

import time

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import contrastive_kernels as ck
from benchmarks.measure import Step, peak_extra_mib
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
    "same": lambda x, y, ids, bias, cutoff, **o: torch.stack(
        ck.similarity_logsumexp(x, y, x_ids=ids, y_ids=ids, same=True, exclude_diagonal=True, columns=True, **o)
    ),
    "sum of the same": lambda x, y, ids, bias, cutoff, **o: ck.similarity_sum(
        x, term=ck.Square(), x_ids=ids, same=True, exclude_diagonal=True, **o
    ),
    "cutoff": lambda x, y, ids, bias, cutoff, **o: ck.similarity_logsumexp(x, y, cutoff=cutoff, **o),
    "mean": lambda x, y, ids, bias, cutoff, **o: (
        ck.similarity_softmax_mean(x, y, y.sin(), scale=3.0, x_ids=ids, y_ids=ids, y_bias=bias, cutoff=cutoff, **o).T
    ),
    "mean of itself": lambda x, y, ids, bias, cutoff, **o: ck.similarity_softmax_mean(x, None, y, x_ids=ids, **o).T,
    "guide": lambda x, y, ids, bias, cutoff, **o: ck.similarity_logsumexp(
        x, y, x_ids=ids, y_ids=ids, y_bias=bias, guide=(x.sin(), y), guide_cutoff=0.1, **o
    ),
    "guide of itself": lambda x, y, ids, bias, cutoff, **o: ck.similarity_logsumexp(
        x, x_ids=ids, guide=(y, None), guide_cutoff=bias.detach(), **o
    ),
    "guide without the diagonal": lambda x, y, ids, bias, cutoff, **o: ck.similarity_logsumexp(
        x, exclude_diagonal=True, guide=(y, None), guide_cutoff=bias.detach(), **o
    ),
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


def columns_on_a_rank(group, sizes):
    """Return primitives of x and of a y that has another number of rows, and the gradients of a sum of them."""
    x, y = batch()[0], batch()[1].repeat(2, 1)[: sum(sizes)]
    if group is not None:
        x, y = own(x, group), y.split(sizes)[group.rank()]
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    rows, columns = ck.similarity_logsumexp(x, y, columns=True, group=group)
    sums = ck.similarity_sum(x, y, term=ck.Band(0.1, 0.9), group=group)
    total = ck.similarity_sum(x, y, term=ck.Softplus(), reduction="sum", group=group)
    selected, _ = ck.row_select(x, y, 3, group=group)
    grads = torch.autograd.grad(rows.sum() + columns.square().sum() + sums.sum() + total, (x, y))
    return rows.detach(), columns.detach(), sums.detach(), selected, total.detach()[None], *grads


@pytest.mark.parametrize("sizes", [(7, 3, 2), (5, 0, 7)])
def test_columns_have_numbers_of_their_own(ranks, sizes):
    """The rows of y need not be as many to a row of x on all ranks; a rank may have none."""
    for k, (parts, whole) in enumerate(
        zip(zip(*ranks.run(3, columns_on_a_rank, sizes), strict=True), columns_on_a_rank(None, sizes), strict=True)
    ):
        found = torch.cat(parts)
        torch.testing.assert_close(found.sum(0, keepdim=True) if k == 4 else found, whole, **EXACT)


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
    "text_features": (lambda x, y, rank, **o: ck.clip_loss(x, y[1:] if rank == 1 else y, 3.0, **o)),
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


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_differ_raise_the_same_error(ranks, name, world):
    """On all of them, at once, and the group serves the next loss."""
    errors, seconds, losses = zip(*ranks.run(world, difference_on_a_rank, name), strict=True)
    assert len(set(errors)) == 1
    kind, text = errors[0]
    assert kind == ("ValueError" if name == "empty" else "RuntimeError")
    assert name in text
    assert "rank" in text
    assert max(seconds) < 5  # hundredths of a second, but for another load of the machine
    expected = ck.clip_loss(*(v[: sum(SIZES[:world])] for v in batch()), 3.0)
    torch.testing.assert_close(torch.stack(losses).mean(), expected, **EXACT)


def refused_on_a_rank(group, what):
    x, y = (own(v, group).requires_grad_() for v in batch())
    if what == "dtensor":
        mesh = init_device_mesh("cpu", (3,))
        return ck.nt_xent_loss(DTensor.from_local(x.detach()[:1], mesh), y, group=group)
    if what == "mmcl":
        return ck.mmcl_loss(x, y, group=group)
    loss = ck.nt_xent_loss(x, y, group=group) if what == "second" else ck.siglip_loss(x, y, 3.0, group=group)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    return grad.square().sum().backward()


@pytest.mark.parametrize(
    ("what", "message"),
    [("mmcl", "gather"), ("second", "second deriv"), ("second of a total", "second deriv")],
)
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
    two = (x, x, ids, ids) if not itself else (x, None, ids, None)
    for k in (2, 6):
        arguments = (*two[:2], k, True, *two[2:], True, 1, *of_group)
        torch.library.opcheck(operators.group_select.default, arguments)
    total = what._replace(exponents=(), column_lse=False, term="softplus")
    none, empty = x.new_empty(0, 4).detach(), x.new_empty(0).detach()
    upstream = Upstream(none, empty, torch.ones(4).double(), none, empty)
    wanted = [True, not itself, False, False, False, False, True]
    torch.library.opcheck(operators.group_sweep_backward.default, (*upstream, *detached, *total, wanted, *of_group))
    torch.library.opcheck(operators.group_same_rows.default, (x, [4, 0], group.group_name))
    parts, factor = torch.randn(1, 4, 5), torch.tensor(2.0)
    torch.library.opcheck(operators.group_sum_at_home.default, (parts, factor, group.group_name, [4], 1 << 20))
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


def counted_on_a_rank(group, rows_to_push):
    """Return how often gradients of other ranks' rows go home, and the pairs that this rank sweeps there and back."""
    x, y = (own(v, group).requires_grad_() for v in batch())
    pairs, calls, home = [], [], groups._sum_at_owners

    def counted(sweep):
        def run(*arguments):
            def operator(*flat):
                n, m = (flat[k] for k in (5, 6)) if len(flat) > 20 else flat[:2]
                pairs.append(n.shape[0] * (n if m is None else m).shape[0])
                return arguments[-1](*flat)

            return sweep(*arguments[:-1], operator)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "_sum_at_owners", lambda *a: calls.append(a) or home(*a))
        if rows_to_push is not None:
            patch.setattr(groups, "ROWS_TO_PUSH", {"cpu": rows_to_push})
        for name in ("sweep", "sweep_backward"):
            patch.setattr(groups, name, counted(getattr(groups, name)))
        scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        value = ck.nt_xent_loss(x, y, temperature=1 / scale, group=group)
        value.backward()
    return len(calls), sum(pairs), value.detach(), x.grad, y.grad, scale.grad


def test_pairs_of_rows_with_themselves_are_met_once(ranks):
    """Or twice, without gradients that travel, where the rows are few and gradients are slow."""
    sizes = [2 * n for n in SIZES]
    alone, together = sum(n * n for n in sizes), sum(sizes) ** 2
    pushed = ranks.run(3, counted_on_a_rank, None)
    pulled = ranks.run(3, counted_on_a_rank, 1000)
    assert [calls for calls, *_ in pushed] == [1] * 3
    assert [calls for calls, *_ in pulled] == [0] * 3
    assert sum(pairs for _, pairs, *_ in pushed) == together + alone
    assert sum(pairs for _, pairs, *_ in pulled) == (together + alone) // 2 + together
    for one, other in zip(pushed, pulled, strict=True):
        for a, b in zip(one[2:5], other[2:5], strict=True):
            torch.testing.assert_close(a, b, **EXACT)
    of_scale = [sum(grads[5] for grads in found) for found in (pushed, pulled)]
    torch.testing.assert_close(*of_scale, **EXACT)


def place(rank, sizes):
    """Return a rank of a group that is not there."""
    return type("Place", (groups.Peers,), {"rank": rank})("", sizes, 0)


@pytest.mark.parametrize("sizes", [(4, 3), (1, 5), (2, 3, 4), (3, 1, 4, 2), (1, 1, 1, 1, 1), (2, 5, 1, 3, 4, 2)])
@pytest.mark.parametrize("step", [2, 5])
def test_every_pair_of_other_ranks_rows_has_its_place(sizes, step):
    """Whatever the number of ranks: with `once` on one of the two ranks, otherwise on both."""
    offsets = [sum(sizes[:rank]) for rank in range(len(sizes))]
    apart = 1 - torch.block_diag(*(torch.ones(n, n) for n in sizes))
    for once in (False, True):
        met = torch.zeros(sum(sizes), sum(sizes))
        for rank, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
            for start in range(0, max(sizes), step):
                stop = min(start + step, max(sizes))
                for columns, rows in groups._places(place(rank, sizes), start, stop, once):
                    for other, length in enumerate(columns.lengths(), columns.first):
                        first = offsets[other] + columns.start
                        met[offset : offset + size][rows, first : first + length] += 1
        assert torch.equal(met + met.T if once else met, apart)


# Totals

FACTORS = [0.5, 2.0, -1.5]


def total_on_a_rank(group, itself, limit):
    """Return how many forward sweeps a total takes, whether its bits are those without gradients, and the gradients."""
    x, y = (own(v, group).requires_grad_() for v in batch())
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    sweeps, sweep = [], groups.sweep

    def total():
        return ck.similarity_sum(x, None if itself else y, term=ck.Softplus(scale, 0.3), reduction="sum", group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "sweep", lambda *a: sweeps.append(a) or sweep(*a))
        ck.set_workspace_limit(limit)
        value = total()
        leaves = (x, scale) if itself else (x, y, scale)
        first, grads = (torch.autograd.grad(f * value, leaves, retain_graph=True) for f in (1.0, FACTORS[group.rank()]))
        of_x = torch.autograd.grad(value, x, retain_graph=True)
        count = len(sweeps)
        with torch.no_grad():
            same = torch.equal(total(), value) and torch.equal(of_x[0], first[0])
        ck.set_workspace_limit(None)
    return count, same, value.detach(), *grads


@pytest.mark.parametrize(("limit", "sweeps"), [(None, 0), (1500, 0), (1, 1)], ids=["whole", "slices", "two sweeps"])
@pytest.mark.parametrize("itself", [False, True])
def test_a_total_takes_one_sweep(ranks, itself, limit, sweeps):
    """As far as the workspace holds the gradients of all ranks' rows, which wait for the factor of each rank's loss."""
    x, y = (v.requires_grad_() for v in batch())
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    sums = ck.similarity_sum(x, None if itself else y, term=ck.Softplus(scale, 0.3)).split(SIZES)
    leaves = (x, scale) if itself else (x, y, scale)
    expected = torch.autograd.grad(sum(f * v.sum() for f, v in zip(FACTORS, sums, strict=True)), leaves)
    counts, same, values, *grads, of_scale = zip(*ranks.run(3, total_on_a_rank, itself, limit), strict=True)
    assert counts == (sweeps,) * 3
    assert all(same)
    torch.testing.assert_close(torch.stack(values), torch.stack([v.sum() for v in sums]), **EXACT)
    torch.testing.assert_close(sum(of_scale), expected[-1], **EXACT)
    for parts, whole in zip(grads, expected, strict=False):
        torch.testing.assert_close(torch.cat(parts), whole, **EXACT)


def peak_on_a_rank(group, name, n, d):
    """Return the peak of forward and backward, beyond inputs and gradients, in units of this rank's rows of x."""
    x, y = (torch.randn(n, d).div(d**0.5).requires_grad_() for _ in range(2))

    def gradients(value):
        return dict(zip("xy", torch.autograd.grad(value, (x, y)), strict=True))

    ck.set_workspace_limit(4 * x.nbytes)
    peak = peak_extra_mib(Step(lambda: PEAKS[name][0](x, y, group=group), gradients), torch.device("cpu"))
    ck.set_workspace_limit(None)
    return peak * 2**20 / x.nbytes


PEAKS = {
    "clip": (lambda x, y, **o: ck.clip_loss(x, y, 5.0, **o), 5.5),
    "nt_xent": (lambda x, y, **o: ck.nt_xent_loss(x, y, normalize=False, **o), 9.0),
    "siglip": (lambda x, y, **o: ck.siglip_loss(x, y, 5.0, -5.0, **o), 8.5),
}


@pytest.mark.parametrize("name", PEAKS)
def test_peak_is_bounded(ranks, name):
    """Beyond the workspace of four there are few copies of the rows of x."""
    assert max(ranks.run(2, peak_on_a_rank, name, 512, 256)) <= PEAKS[name][1]
