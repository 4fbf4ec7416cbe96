"""lightly's losses beside ours: what the cases of the self-test do not say."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from contrastive_kernels.compat import _small
from contrastive_kernels.compat import lightly as ours
from contrastive_kernels.compat.check.case import TOLERANCE, Draw, difference
from tests.support import adapters

adapters.require_peers()
pytestmark = pytest.mark.peers

GATHERING = ("NTXentLoss", "DirectCLRLoss", "DCLLoss", "DCLWLoss", "BarlowTwinsLoss", "VICRegLoss")
VIEWS = (*GATHERING, "HypersphereLoss")
PATHS = pytest.mark.parametrize("largest", [0, _small._largest], ids=["sweep", "formula"])


@pytest.fixture(scope="module")
def theirs():
    return adapters.modules("lightly")[1]


def views(n=7, d=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2)]


def differentiated(loss, rows):
    """Return value and gradients."""
    value = loss(*rows)
    grads = torch.autograd.grad(value, rows, allow_unused=True)
    found = {str(i): torch.zeros_like(x) if g is None else g for i, (x, g) in enumerate(zip(rows, grads, strict=True))}
    return {"value": value.detach(), **found}


# What it looks like


@pytest.mark.parametrize("name", VIEWS)
def test_has_the_attributes(name, theirs):
    mine, peer = getattr(ours, name)(), getattr(theirs, name)()
    public = {key for key in vars(peer) if not key.startswith("_")}
    assert public == {key for key in vars(mine) if not key.startswith("_")}
    for key in public - {"weight_fn"}:
        assert getattr(mine, key) == getattr(peer, key)
    assert [key for key, _ in mine.named_modules()] == [key for key, _ in peer.named_modules()]
    assert dict(mine.named_buffers()).keys() == dict(peer.named_buffers()).keys()


def test_signature_of_the_memory_bank(theirs):
    """The default size is that of releases that had one."""
    mine, peer = (adapters.parameters(module.MemoryBankModule) for module in (ours, theirs))
    assert [name for name, *_ in mine] == [name for name, *_ in peer]
    assert mine[0][2] == 65536 and mine[1:] == peer[1:]
    forward = (adapters.parameters(module.MemoryBankModule.forward) for module in (ours, theirs))
    assert next(forward) == next(forward)


def test_other_names_are_the_peers(theirs):
    assert ours.NegativeCosineSimilarity is theirs.NegativeCosineSimilarity
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        ours.Nothing  # noqa: B018


# Memory bank


def test_the_bank_is_seeded_alike(theirs):
    banks = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        banks.append(module.NTXentLoss(memory_bank_size=(9, 4)).memory_bank)
    assert torch.equal(banks[0].bank, banks[1].bank) and torch.equal(banks[0].bank_ptr, banks[1].bank_ptr)
    assert not banks[0].state_dict() and not banks[1].state_dict()


def test_a_copied_bank_goes_on_by_itself(theirs):
    loss = ours.NTXentLoss(memory_bank_size=(10, 6)).double()
    loss(*views())
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin.memory_bank.bank, loss.memory_bank.bank)
        before = loss.memory_bank.bank.clone()
        twin(*views(seed=1))
        assert torch.equal(loss.memory_bank.bank, before) and not torch.equal(twin.memory_bank.bank, before)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_any_dtype_meets_the_bank(dtype, largest, theirs):
    """lightly takes float32 alone; here it gets the same rows and the same bank in float64."""
    query, key = views(9, 8, dtype)
    mine, peer = (module.NTXentLoss(0.3, memory_bank_size=(20, 8)) for module in (ours, theirs))
    peer.double()
    peer.memory_bank.bank.copy_(mine.memory_bank.bank)
    with _small.largest(largest):
        found = differentiated(mine, [query, key])
    expected = differentiated(peer, [x.detach().double().requires_grad_() for x in (query, key)])
    assert found["value"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-6 if dtype == torch.float64 else 2e-2
    assert difference(found, expected) < tolerance
    assert mine.memory_bank.bank.dtype == torch.float32
    assert torch.allclose(mine.memory_bank.bank.double(), peer.memory_bank.bank, atol=tolerance)


@pytest.mark.parametrize("grad", [True, False], ids=["training", "no_grad"])
def test_the_bank_is_not_updated_without_gradient(grad, theirs):
    for module in (ours, theirs):
        loss = module.NTXentLoss(memory_bank_size=(10, 6)).double()
        with torch.set_grad_enabled(grad):
            loss(*views())
        assert int(loss.memory_bank.bank_ptr) == (7 if grad else 0)


def test_a_bank_that_is_replaced_is_used(theirs):
    """Its rows need no unit norm."""
    results = []
    for module in (ours, theirs):
        loss = module.NTXentLoss(0.4, memory_bank_size=(5, 6)).double()
        loss.memory_bank.bank = torch.arange(30.0, dtype=torch.float64).reshape(5, 6) / 10
        results.append(differentiated(loss, views()))
    assert difference(*results) <= TOLERANCE


# What it refuses

MISUSES = {
    "temperature": lambda m: m.NTXentLoss(1e-9),
    "temperature-directclr": lambda m: m.DirectCLRLoss(temperature=0),
    "negative-size": lambda m: m.MemoryBankModule(-1),
    "negative-dimension": lambda m: m.NTXentLoss(memory_bank_size=(10, -1)),
    "size-of-one": lambda m: m.MemoryBankModule((5,)),
    "size-of-three": lambda m: m.MemoryBankModule((5, 2, 3)),
    "one-row-barlow": lambda m: m.BarlowTwinsLoss()(*views(1)),
    "one-row-vicreg": lambda m: m.VICRegLoss()(*views(1)),
    "one-row-of-positions": lambda m: m.VICRegLoss()(torch.ones(1, 3, 4), torch.ones(1, 3, 4)),
    "dimensions-barlow": lambda m: m.BarlowTwinsLoss()(torch.ones(3, 4), torch.ones(3, 5)),
    "shapes-vicreg": lambda m: m.VICRegLoss()(torch.ones(3, 4), torch.ones(3, 5)),
    "vector": lambda m: m.NTXentLoss()(torch.ones(4), torch.ones(4)),
    "three-dimensions": lambda m: m.NTXentLoss()(torch.ones(4, 2, 2), torch.ones(4, 2, 2)),
    "weights": lambda m: m.DCLLoss(weight_fn=lambda x, y: x.new_ones(3))(*views()),
}


@pytest.mark.parametrize("misuse", MISUSES.values(), ids=MISUSES)
def test_refuses_the_same(misuse, theirs):
    with pytest.raises(Exception) as refusal:  # noqa: PT011, the type is the question
        misuse(theirs)
    for largest in (0, _small._largest):
        with _small.largest(largest), pytest.raises(refusal.type):
            misuse(ours)


@pytest.mark.parametrize("name", ["BarlowTwinsLoss", "HypersphereLoss", "NTXentLoss"])
def test_no_rows_have_no_mean(name, theirs):
    """NTXentLoss with a bank; without one lightly refuses them."""
    options = {"memory_bank_size": (10, 6)} if name == "NTXentLoss" else {}
    for module in (ours, theirs):
        rows = views(0)
        loss = getattr(module, name)(**options).double()(*rows)
        assert loss.isnan()
        if module is ours:  # the backward of an empty batch normalisation ends the process
            assert [grad.shape for grad in torch.autograd.grad(loss, rows)] == [(0, 6), (0, 6)]


@PATHS
@pytest.mark.parametrize("name", ["VICRegLoss", "HypersphereLoss"])
def test_views_of_two_dtypes(name, largest, theirs):
    rows = [views()[0], views(dtype=torch.float32, seed=1)[1]]
    with _small.largest(largest):
        found = differentiated(getattr(ours, name)(), rows)
    assert difference(found, differentiated(getattr(theirs, name)(), rows)) <= 1e-6


@pytest.mark.parametrize("name", GATHERING)
def test_asks_once_whether_there_is_something_to_gather_with(name, theirs, monkeypatch):
    for module in (ours, theirs):
        asked = []
        monkeypatch.setattr(dist, "is_available", lambda asked=asked: asked.append(1) or len(asked) > 1)
        with pytest.raises(ValueError, match=r"torch\.distributed"):
            getattr(module, name)(gather_distributed=True)
        loss = getattr(module, name)(gather_distributed=True)
        loss(*views())
        assert len(asked) == 2
        getattr(module, name)()
        assert len(asked) == 2


def test_a_criterion_that_stores_all_logits_warns_once(monkeypatch):
    monkeypatch.setattr("contrastive_kernels.compat._peer._warned", set())
    loss = ours.NTXentLoss()
    loss.cross_entropy = nn.MultiMarginLoss()
    with pytest.warns(UserWarning, match="NTXentLoss with another cross_entropy stores the N x N matrix"):
        loss(*views())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(*views())


@PATHS
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(label_smoothing=0.2), nn.MultiMarginLoss()], ids=str)
@pytest.mark.filterwarnings("ignore:NTXentLoss")
def test_the_criterion_against_a_bank(criterion, largest, theirs):
    results = []
    for module in (ours, theirs):
        torch.manual_seed(0)
        loss = module.NTXentLoss(0.3, memory_bank_size=(9, 6)).double()
        loss.cross_entropy = criterion
        with _small.largest(largest):
            results.append(differentiated(loss, views()))
    assert difference(*results) <= TOLERANCE


# Numbers


@PATHS
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore:To copy construct")
def test_half_precision_is_the_value_of_its_rows(name, dtype, largest, theirs):
    rows = views(12, 8, dtype)
    with _small.largest(largest):
        found = differentiated(getattr(ours, name)(), rows)
    expected = differentiated(getattr(theirs, name)(), [x.detach().double().requires_grad_() for x in rows])
    assert found["value"].dtype == torch.float32
    torch.testing.assert_close(found["value"].double(), expected["value"], rtol=1e-2, atol=1e-2)
    for i in "01":
        assert (found[i].double() - expected[i]).norm() <= 2e-2 * expected[i].norm()


@PATHS
@pytest.mark.parametrize("n", [1, 12])
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.filterwarnings("ignore:To copy construct")
def test_autocast_gives_float32(name, n, largest, theirs):
    if n == 1 and name in ("BarlowTwinsLoss", "VICRegLoss"):
        pytest.skip("refused")
    rows = views(n, 8, torch.float32)
    with _small.largest(largest), torch.autocast("cpu", torch.bfloat16):
        found = getattr(ours, name)()(*rows)
    found.backward()
    expected = getattr(theirs, name)()(*(x.double() for x in rows))
    assert found.dtype == rows[0].grad.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2, equal_nan=True)


@PATHS
@pytest.mark.filterwarnings("ignore:NTXentLoss")
@pytest.mark.parametrize("size", [0, (9, 8)], ids=["batch", "bank"])
def test_another_criterion_in_half_precision(size, largest):
    rows, results = views(12, 8, torch.bfloat16), []
    for dtype in (torch.bfloat16, torch.float64):
        torch.manual_seed(0)
        loss = ours.NTXentLoss(memory_bank_size=size)
        loss.cross_entropy = nn.MultiMarginLoss()
        with _small.largest(largest):
            results.append(loss(*(x.to(dtype) for x in rows)))
    assert results[0].dtype == torch.float32
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-2, atol=1e-2)


@PATHS
def test_a_sharp_gaussian_has_a_value(largest, theirs):
    """exp of less than -104 is 0 in float32: lightly's uniformity is then the logarithm of 0."""
    rows = [x.detach().float() for x in views()]
    assert theirs.HypersphereLoss(t=500.0)(*rows) == -torch.inf
    with _small.largest(largest):
        found = ours.HypersphereLoss(t=500.0)(*rows)
    expected = ours.HypersphereLoss(t=500.0)(*(x.double() for x in rows))
    assert torch.allclose(found.double(), expected, rtol=1e-5)


@PATHS
@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss", "HypersphereLoss"])
def test_a_row_of_zeros_has_a_gradient_of_zero(name, largest, theirs):
    rows = views()
    with torch.no_grad():
        rows[0][2] = 0
    with _small.largest(largest):
        found = differentiated(getattr(ours, name)(), rows)
    expected = differentiated(getattr(theirs, name)(), rows)
    assert found["0"][2].abs().max() == 0 and expected["0"][2].abs().max() > 1e8
    expected["0"][2] = 0
    assert difference(found, expected) <= TOLERANCE


def test_vicreg_of_few_rows_has_the_bits_of_the_official_code(theirs):
    """In float32, as lightly's own tests ask for."""
    rows = torch.randn(2, 2, 32)
    x, y = (z - z.mean(0) for z in rows)
    variance = sum((1 - (z.var(0) + 1e-4).sqrt()).relu().mean() / 2 for z in (x, y))
    off = ~torch.eye(32, dtype=torch.bool)
    covariance = sum((z.T @ z)[off].square().sum() / 32 for z in (x, y))
    assert ours.VICRegLoss()(*rows) == 25 * (rows[0] - rows[1]).square().mean() + 25 * variance + covariance


@pytest.mark.parametrize("name", VIEWS)
def test_compiles(name):
    loss, rows = getattr(ours, name)(), views()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert difference(differentiated(compiled, rows), differentiated(loss, rows)) <= TOLERANCE


# Several processes

GATHERED = {
    "nt_xent": lambda m: m.NTXentLoss(0.3, gather_distributed=True),
    "directclr": lambda m: m.DirectCLRLoss(loss_dim=4, gather_distributed=True),
    "dcl": lambda m: m.DCLLoss(0.3, gather_distributed=True),
    "dclw": lambda m: m.DCLWLoss(0.3, 0.4, gather_distributed=True),
    "dcl-weights": lambda m: m.DCLLoss(0.3, lambda x, y: (x * y).sum(1), gather_distributed=True),
    "barlow": lambda m: m.BarlowTwinsLoss(0.02, gather_distributed=True),
    "vicreg": lambda m: m.VICRegLoss(1.0, 2.0, 3.0, gather_distributed=True),
    "smoothed": lambda m: with_criterion(m, nn.CrossEntropyLoss(label_smoothing=0.1)),
    "margin": lambda m: with_criterion(m, nn.MultiMarginLoss()),
    "local": lambda m: m.NTXentLoss(0.3),
}


def with_criterion(module, criterion):
    loss = module.NTXentLoss(0.3, gather_distributed=True)
    loss.cross_entropy = criterion
    return loss


def on_a_rank(group, name, n):
    """Return value and gradients, ours and lightly's, where every rank weighs its loss otherwise."""
    found = []
    for module in adapters.modules("lightly"):
        rows = views(n, 6, seed=dist.get_rank())
        (GATHERED[name](module)(*rows) * (1 + dist.get_rank())).backward()
        found.append({"value": GATHERED[name](module)(*rows).detach(), "0": rows[0].grad, "1": rows[1].grad})
    return found


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("name", GATHERED)
@pytest.mark.filterwarnings("ignore:NTXentLoss")
def test_gathers_as_lightly(name, n, ranks):
    if n == 1 and name in ("barlow", "vicreg"):
        pytest.skip("refused")
    for mine, peer in ranks.run(3, on_a_rank, name, n):
        assert difference(mine, peer) <= TOLERANCE


def positions_on_a_rank(group):
    found = []
    for module in adapters.modules("lightly"):
        draw = Draw(4, seed=dist.get_rank())
        rows = [draw.rows(4, 2, 3), draw.rows(4, 2, 3)]
        found.append(differentiated(module.VICRegLoss(gather_distributed=True), rows))
    return found


def test_gathers_positions(ranks):
    for mine, peer in ranks.run(3, positions_on_a_rank):
        assert difference(mine, peer) <= TOLERANCE


def bank_on_a_rank(group):
    """Return losses and banks of steps that pass the end of the bank."""
    found = []
    for module in adapters.modules("lightly"):
        torch.manual_seed(0)
        loss, tensors = module.NTXentLoss(memory_bank_size=(20, 6), gather_distributed=True).double(), {}
        for step in range(3):
            rows = views(3, 6, seed=10 * step + dist.get_rank())
            tensors |= {f"{step} {key}": x for key, x in differentiated(loss, rows).items()}
            tensors[f"{step} bank"] = loss.memory_bank.bank.clone()
        found.append(tensors)
    return found


def test_all_ranks_fill_the_bank(ranks):
    banks = []
    for mine, peer in ranks.run(3, bank_on_a_rank):
        assert difference(mine, peer) <= TOLERANCE
        banks.append(mine["2 bank"])
    assert torch.equal(banks[0], banks[1]) and torch.equal(banks[0], banks[2])
