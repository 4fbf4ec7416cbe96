"""Every loss over the ranks of a group is the loss of one process with the rows of all of them."""

import contextlib
import copy
import pickle

import pytest
import torch
import torch.utils.checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import contrastive_kernels as ck
import python_ref
from tests.support.testing import CASES, FAMILY, OPTIONS, dtype_id, errors
from tests.support.variants import EVERY

# Rows of every rank: equal, and one of them with a single row.
SHARDS = {2: [5, 5], 3: [4, 1, 6]}
COLUMNS, DIMENSION = 7, 5
# Arguments that are the same on every rank; all others have a row for every sample.
COMMON = ("queue", "support", "label_embeddings")
# The workspace limit in bytes: all rows are gathered at once, or one of every rank at a time.
LIMITS = {"whole": None, "slices": 1}
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def inputs(case, option, n):
    """Return the whole batch of a case in float64 and what its option adds."""
    torch.manual_seed(0)
    features = case.features((n, COLUMNS, DIMENSION))
    given = {**features, **OPTIONS[option](case, n, COLUMNS)}
    tensors = {name: value for name, value in given.items() if torch.is_tensor(value)}
    return tensors, {name: value for name, value in given.items() if name not in tensors}


def parts(tensors, sizes):
    """Return every rank's arguments."""
    total, of_ranks = sum(sizes), [{} for _ in sizes]
    for name, x in tensors.items():
        if is_common(name, tensors):
            pieces = [x] * len(sizes)
        elif name == "key_ids" and x.shape[0] == total + COLUMNS:
            negatives = x[total:].tensor_split(len(sizes))
            pieces = [torch.cat(pair) for pair in zip(x[:total].split(sizes), negatives, strict=True)]
        else:
            # what is no row of the batch is one of the negatives
            pieces = x.split(sizes) if x.shape[0] == total else x.tensor_split(len(sizes))
        for mine, piece in zip(of_ranks, pieces, strict=True):
            mine[name] = piece
    return of_ranks


def is_common(name, tensors):
    """Return whether an argument is the same on every rank."""
    return tensors[name].dim() == 0 or name in COMMON or (name == "key_ids" and "queue" in tensors)


def differentiated(function, tensors, upstream=None):
    """Return the value and the gradients of all floating tensors, zeros where there is none."""
    leaves = {k: x.detach().clone().requires_grad_() if x.is_floating_point() else x for k, x in tensors.items()}
    value = function(**leaves)
    if value.requires_grad:
        value.backward(torch.ones_like(value) if upstream is None else upstream.reshape(value.shape))
    grads = {k: torch.zeros_like(x) if x.grad is None else x.grad for k, x in leaves.items() if x.is_floating_point()}
    return value.detach(), grads


def on_a_rank(group, name, option, sizes, limit, fixed, upstream):
    """Return value and gradients of this rank's loss; an upstream gradient (K, N) has one column for every sample."""
    case, rank = EVERY[name], group.rank()
    tensors, others = inputs(case, option, sum(sizes))
    flow = None if upstream is None else upstream.split(sizes, 1)[rank]
    ck.set_workspace_limit(limit)
    try:
        return differentiated(
            lambda **t: case(ck, t, **{**others, **fixed}, group=group), parts(tensors, sizes)[rank], flow
        )
    finally:
        ck.set_workspace_limit(None)


def check(ranks, name, world, option="mean", limit=None, **fixed):
    """Raise unless the ranks' losses and their gradients are those of one process: averaged, or of every anchor."""
    case, sizes = EVERY[name], SHARDS[world]
    n = sum(sizes)
    tensors, others = inputs(case, option, n)
    each = {**case.options, **others, **fixed}.get("reduction") == "none"
    upstream = 1 + torch.cos(2.1 * torch.arange(9.0 * n, dtype=torch.float64))  # differs from anchor to anchor

    def loss(**t):
        return case(python_ref, t, **{**others, **fixed})

    flow = upstream[: loss(**tensors).numel()] if each else None
    value, grads = differentiated(loss, tensors, flow)
    found = ranks.run(world, on_a_rank, name, option, sizes, limit, fixed, None if flow is None else flow.view(-1, n))
    if each:
        pieces = [v.reshape(-1, size) for (v, _), size in zip(found, sizes, strict=True)]
        torch.testing.assert_close(torch.cat(pieces, 1).reshape(value.shape), value, **EXACT)
    else:
        torch.testing.assert_close(torch.stack([v for v, _ in found]).mean(0), value, **EXACT)
    for key, expected in grads.items():
        own = [g[key] for _, g in found]
        whole = torch.stack(own).sum(0) if is_common(key, tensors) else torch.cat(own)
        whole = whole if each else whole / world
        torch.testing.assert_close(whole, expected, **EXACT, msg=lambda text, key=key: f"gradient of {key}: {text}")


# Averages


NAMES = [name for name, case in EVERY.items() if case.loss != "mmcl_loss"]


@pytest.mark.parametrize(("world", "limit"), [(2, "whole"), (3, "slices")])
@pytest.mark.parametrize("name", NAMES)
def test_average(ranks, name, world, limit):
    """The mean of the ranks' losses, and gradients averaged over them, are those of one process."""
    fixed = {"reduction": "mean"} if EVERY[name].options.get("reduction") == "none" else {}
    check(ranks, name, world, limit=LIMITS[limit], **fixed)


# What reaches the other ranks in a way of its own; the second kind is part of the first.
REACHING = ("sum", "tensor scale", "weight", "weight, none", "label smoothing, ids", "label smoothing of survivors")
OTHERWISE = ("ids", "cutoff margin per anchor")


def option_params():
    """Return the main forms of all losses with the options that they take."""
    found = []
    for name in NAMES:
        case = EVERY[name]
        options = REACHING if case.takes("label_smoothing") else REACHING + OTHERWISE
        for option in options if name in {**CASES, **FAMILY} else ():
            if all(case.takes(key) for key in OPTIONS[option](case, 4, COLUMNS)):
                found.append(pytest.param(name, option, id=f"{name}-{option.replace(' ', '_')}"))
    return found


@pytest.mark.parametrize(("name", "option"), option_params())
def test_options(ranks, name, option):
    """Means, sums, and the losses of all anchors for an upstream gradient of each."""
    check(ranks, name, 3, option)


# Statistics, many upstream gradients, frozen inputs


def batch(n=11, d=DIMENSION):
    torch.manual_seed(1)
    return [torch.randn(n, d, dtype=torch.float64) for _ in range(2)]


def own(x, group, sizes=(4, 1, 6)):
    return x.split(list(sizes))[group.rank()].clone().requires_grad_()


def statistics_on_a_rank(group):
    x, y = (own(v, group) for v in batch())
    return ck.clip_loss(x, y, 5.0, return_stats=True, group=group)[1]


def test_statistics(ranks):
    """The accuracy is the whole batch's on every rank, everything else that of the rank's own anchors."""
    expected = ck.clip_loss(*batch(), 5.0, return_stats=True)[1]
    found = ranks.run(3, statistics_on_a_rank)
    assert all(torch.equal(stats.accuracy, expected.accuracy) for stats in found)
    for field in ("positive_logit", "lse", "logit_max"):
        torch.testing.assert_close(torch.cat([getattr(s, field) for s in found], 1), getattr(expected, field), **EXACT)


FACTORS = [0.5, 2.0, -1.5]


def siglip_of(x, y, weight, **options):
    return ck.siglip_loss(x, y, 5.0, -1.0, weight=weight, **options)


def factors_on_a_rank(group):
    x, y = (own(v, group) for v in batch())
    weight = own(torch.linspace(0.1, 1.0, 11, dtype=torch.float64), group)
    (FACTORS[group.rank()] * siglip_of(x, y, weight, group=group)).backward()
    return x.grad, y.grad, weight.grad


def test_ranks_may_have_factors_of_their_own(ranks):
    """Backward gives the gradient of the sum of what all ranks go back from."""
    tensors = [v.requires_grad_() for v in (*batch(), torch.linspace(0.1, 1.0, 11, dtype=torch.float64))]
    losses = siglip_of(*tensors, reduction="none").split([4, 1, 6])
    total = sum(f * loss.sum() for f, loss in zip(FACTORS, losses, strict=True))
    expected = torch.autograd.grad(3 * total / tensors[2].sum(), tensors)
    for parts_of_ranks, whole in zip(zip(*ranks.run(3, factors_on_a_rank), strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(parts_of_ranks), whole, **EXACT)


def frozen_on_a_rank(group):
    x, y = (own(v, group) for v in batch())
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    ck.clip_loss(x.detach(), y, scale, group=group).backward()
    with torch.no_grad():
        value = ck.clip_loss(x, y, scale, group=group)
    return y.grad, scale.grad, value


def test_frozen_tower(ranks):
    x, y = batch()
    y.requires_grad_()
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    value = ck.clip_loss(x, y, scale)
    value.backward()
    grads, scales, values = zip(*ranks.run(3, frozen_on_a_rank), strict=True)
    torch.testing.assert_close(torch.cat(grads) / 3, y.grad, **EXACT)
    torch.testing.assert_close(torch.stack(scales).mean(), scale.grad, **EXACT)
    torch.testing.assert_close(torch.stack(values).mean(), value.detach(), **EXACT)


# Groups and modules


def alone_on_a_rank(group):
    x, y = (v.float().requires_grad_() for v in batch())
    results = []
    for given in (None, group):
        loss = ck.nt_xent_loss(x, y, group=given)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, y))))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_group_of_one_has_the_same_bits(ranks):
    assert ranks.run(1, alone_on_a_rank) == [True]


def twice_on_a_rank(group):
    x, y = (own(v.float(), group) for v in batch())

    def run():
        loss = ck.info_nce_loss(x, y, group=group)
        return (loss.detach(), *torch.autograd.grad(loss, (x, y)))

    return all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_the_same_input_has_the_same_bits(ranks):
    assert ranks.run(3, twice_on_a_rank) == [True] * 3


def world_on_a_rank(group):
    mesh = init_device_mesh("cpu", (3,))
    x, y = (own(v, group) for v in batch())
    module = ck.InfoNCELoss(0.1, group="world")
    pickled = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    return [loss(x, y).detach() for loss in (module, pickled, ck.InfoNCELoss(0.1, group=mesh))]


def test_the_world_and_a_mesh(ranks):
    """A module that holds the word can be copied and saved; a mesh of one dimension is a group."""
    expected = ck.info_nce_loss(*batch(), temperature=0.1)
    for losses in zip(*ranks.run(3, world_on_a_rank), strict=True):
        torch.testing.assert_close(torch.stack(losses).mean(), expected, **EXACT)


def queues_on_a_rank(group, module):
    torch.manual_seed(0)
    loss = getattr(ck, module)(DIMENSION, 8, group=group).double()
    values = []
    for query, key in (batch(), reversed(batch())):
        keys = key if module == "MoCoLoss" else key[:, None].expand(-1, 2, -1)
        values.append(loss(own(query, group), own(keys, group)).detach())
    return torch.stack(values), loss.queue


@pytest.mark.parametrize("module", ["MoCoLoss", "MoCoArCLLoss"])
def test_queues_stay_equal(ranks, module):
    """All ranks' keys enter every queue, in rank order, as in one process."""
    torch.manual_seed(0)
    loss = getattr(ck, module)(DIMENSION, 8).double()
    for query, key in (batch(), reversed(batch())):
        keys = key if module == "MoCoLoss" else key[:, None].expand(-1, 2, -1)
        value = loss(query, keys)
    found = ranks.run(3, queues_on_a_rank, module)
    torch.testing.assert_close(torch.stack([values[1] for values, _ in found]).mean(), value, **EXACT)
    assert all(torch.equal(queue, loss.queue) for _, queue in found)


# DistributedDataParallel


class Towers(torch.nn.Module):
    """Two encoders with a learned scale."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.image, self.text = (torch.nn.Linear(DIMENSION, 4, dtype=torch.float64) for _ in range(2))
        self.scale = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x, y):
        return self.image(x), self.text(y), self.scale.exp()


def towers_loss(towers, x, y, **options):
    """Return three losses of one graph."""
    image, text, scale = towers(x, y)
    clip = ck.clip_loss(image, text, scale, normalize=True, **options)
    return clip + ck.vicreg_loss(image, text, **options) + ck.siglip_loss(image, text, scale, -1.0, **options)


def ddp_on_a_rank(group, static_graph):
    towers = Towers()
    parallel = torch.nn.parallel.DistributedDataParallel(towers, process_group=group, static_graph=static_graph)
    x, y = (own(v, group).detach() for v in batch())
    with contextlib.nullcontext() if static_graph else parallel.no_sync():
        towers_loss(parallel, x, y, group=group).backward()
    towers_loss(parallel, y, x, group=group).backward()
    return [p.grad for p in towers.parameters()]


@pytest.mark.parametrize("static_graph", [False, True])
def test_distributed_data_parallel(ranks, static_graph):
    """Two accumulated steps of two encoders give the gradients of one process with both whole batches."""
    towers, (x, y) = Towers(), batch()
    (towers_loss(towers, x, y) + towers_loss(towers, y, x)).backward()
    for grads in ranks.run(3, ddp_on_a_rank, static_graph):
        for parameter, grad in zip(towers.parameters(), grads, strict=True):
            torch.testing.assert_close(grad, parameter.grad, **EXACT)


def fsdp_on_a_rank(group):
    mesh = init_device_mesh("cpu", (3,))
    towers = Towers()
    for part in (towers.image, towers.text):
        fully_shard(part, mesh=mesh)
    x, y = (own(v, group).detach() for v in batch())
    image, text, _ = towers(x, y)
    ck.clip_loss(image, text, 5.0, normalize=True, group=mesh).backward()
    return [p.grad.full_tensor() for part in (towers.image, towers.text) for p in part.parameters()]


def test_fully_sharded(ranks):
    """FSDP2 averages as DistributedDataParallel does."""
    towers, (x, y) = Towers(), batch()
    image, text, _ = towers(x, y)
    ck.clip_loss(image, text, 5.0, normalize=True).backward()
    expected = [p.grad for part in (towers.image, towers.text) for p in part.parameters()]
    for grads in ranks.run(3, fsdp_on_a_rank):
        for grad, whole in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, whole, **EXACT)


# Compiled


def compiled_on_a_rank(group, name):
    case = EVERY[name]
    tensors, others = inputs(case, "mean", 9)
    mine = parts(tensors, [3, 3, 3])[group.rank()]

    def loss(**t):
        return case(ck, t, **others, group=group)

    return differentiated(torch.compile(loss, backend="aot_eager", fullgraph=True), mine), differentiated(loss, mine)


@pytest.mark.parametrize("name", ["clip", "nt_xent", "siglip", "vicreg", "sup_con"])
def test_compiles(ranks, name):
    """In one graph, with the value and gradients of eager mode."""
    for (value, grads), (expected, of_eager) in ranks.run(3, compiled_on_a_rank, name):
        torch.testing.assert_close(value, expected, **EXACT)
        for key, grad in grads.items():
            torch.testing.assert_close(grad, of_eager[key], **EXACT)


def uneven_on_a_rank(group, name):
    case, rank = EVERY[name], group.rank()
    tensors, others = inputs(case, "mean", 11)
    mine = parts(tensors, SHARDS[3])[rank]
    compiled = torch.compile(lambda **t: case(ck, t, **others, group=group), backend="aot_eager", fullgraph=True)
    try:
        compiled(**mine)
    except RuntimeError as error:
        return str(error), case(ck, mine, **others, group=group)
    return "", None


@pytest.mark.parametrize("name", ["clip", "alignment"])
def test_compiled_losses_refuse_unequal_shards(ranks, name):
    """On all ranks, with a way out; the group serves the next loss."""
    tensors, others = inputs(EVERY[name], "mean", 11)
    expected = EVERY[name](ck, tensors, **others)
    errors, values = zip(*ranks.run(3, uneven_on_a_rank, name), strict=True)
    assert len(set(errors)) == 1
    assert "rank 1: [1" in errors[0]
    assert "set_shards" in errors[0]
    torch.testing.assert_close(torch.stack(values).mean(), expected, **EXACT)


# Rounding, NaN


def half_rows(dtype, n=192, d=32):
    torch.manual_seed(3)
    return [torch.nn.functional.normalize(torch.randn(n, d, dtype=torch.float64), dim=1).to(dtype) for _ in range(2)]


HALVED = {
    "clip": lambda x, y, **o: ck.clip_loss(x, y, 14.3, **o),
    "nt_xent": lambda x, y, **o: ck.nt_xent_loss(x, y, temperature=0.1, normalize=False, **o),
    "siglip": lambda x, y, **o: ck.siglip_loss(x, y, 10.0, -5.0, **o),
}


def halved_on_a_rank(group, name, dtype, limit):
    x, y = (own(v, group, [192 // group.size()] * group.size()) for v in half_rows(dtype))
    ck.set_workspace_limit(limit)
    loss = HALVED[name](x, y, group=group)
    loss.backward()
    ck.set_workspace_limit(None)
    return loss.detach(), x.grad, y.grad


@pytest.mark.parametrize(("world", "limit"), [(2, None), (3, None), (3, 1 << 13)], ids=["2", "3", "3 in slices"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("name", HALVED)
def test_half_precision(ranks, name, dtype, world, limit):
    """Gradients are as exact as those of one process: they are rounded once."""
    exact, rounded = ([v.to(t).requires_grad_() for v in half_rows(dtype)] for t in (torch.float64, dtype))
    for tensors in (exact, rounded):
        HALVED[name](*tensors).backward()
    losses, *grads = zip(*ranks.run(world, halved_on_a_rank, name, dtype, limit), strict=True)
    value = HALVED[name](*(v.double() for v in half_rows(dtype)))
    torch.testing.assert_close(torch.stack(losses).mean().double(), value, rtol=1e-5, atol=0)
    for wide, once, parts_of_ranks in zip(exact, rounded, grads, strict=True):
        (ours, _), (alone, _) = (
            errors(torch.cat(parts_of_ranks).double() / world, wide.grad),
            errors(once.grad, wide.grad),
        )
        assert ours <= 1.1 * alone


def nan_on_a_rank(group):
    x, y = (own(v, group) for v in batch())
    if group.rank() == 1:
        x = x.detach().fill_(torch.nan).requires_grad_()
    losses = [ck.clip_loss(x, y, 5.0, group=group), ck.nt_xent_loss(x, y, group=group)]
    losses += [ck.siglip_loss(x, y, 5.0, group=group), ck.vicreg_loss(x, y, group=group)]
    losses += [ck.uniformity_loss(x, group=group), ck.distance_polarization(x, group=group)]
    return torch.stack(losses).isnan()


def test_nan_of_one_rank_is_everywhere(ranks):
    """Where the rows are candidates; a row of SigLIP belongs to its rank."""
    found = torch.stack(ranks.run(3, nan_on_a_rank))
    assert found[1].all()
    assert found[:, [0, 1, 3, 4, 5]].all()
    assert found.float().mean(0)[2] > 0


# Autocast and checkpoints


def autocast_on_a_rank(group, name):
    tensors, others = inputs(EVERY[name], "mean", 9)
    mine = parts({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, [4, 1, 4])[group.rank()]
    with torch.autocast("cpu", torch.bfloat16):
        return differentiated(lambda **t: EVERY[name](ck, t, **others, group=group), mine)


@pytest.mark.parametrize("name", ["clip", "sup_con", "quick_thoughts", "false_negative-attract"])
def test_autocast(ranks, name):
    """The rows travel in autocast's dtype; gradients have that of the features."""
    tensors, others = inputs(EVERY[name], "mean", 9)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        value, grads = differentiated(lambda **t: EVERY[name](ck, t, **others), wide)
    values, of_ranks = zip(*ranks.run(3, autocast_on_a_rank, name), strict=True)
    torch.testing.assert_close(torch.stack(values).mean(), value, rtol=1e-3, atol=1e-3)
    for key, expected in grads.items():
        whole = torch.cat([g[key] for g in of_ranks]) / 3
        assert whole.dtype == torch.float32
        torch.testing.assert_close(whole, expected, rtol=2e-2, atol=2e-3)


def checkpoint_on_a_rank(group):
    x, y = (own(v, group) for v in batch())

    def loss(x, y):
        return ck.nt_xent_loss(x, y, group=group) + ck.clip_loss(x, y, 5.0, group=group)

    plain = torch.autograd.grad(loss(x, y), (x, y))
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(loss, x, y, use_reentrant=False), (x, y))
    return all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_checkpoint(ranks):
    """A loss that is recomputed in the backward, on all ranks."""
    assert ranks.run(3, checkpoint_on_a_rank) == [True] * 3
