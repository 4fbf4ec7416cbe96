"""stable_pretraining's losses beside ours: what the cases of the self-test do not say."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from contrastive_kernels.compat import _small
from contrastive_kernels.compat import stable_pretraining as ours
from contrastive_kernels.compat.check.case import TOLERANCE, difference
from tests.support import adapters

adapters.require_peers()
pytestmark = pytest.mark.peers

VIEWS = ("NTXEntLoss", "CLIPLoss", "BarlowTwinsLoss", "VICRegLoss")
PATHS = pytest.mark.parametrize("largest", [0, _small._largest], ids=["sweep", "formula"])


@pytest.fixture(scope="module")
def theirs():
    return adapters.modules("stable_pretraining")[1]


def views(n=7, d=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2)]


def differentiated(loss, rows):
    """Return value and gradients."""
    value = loss(*rows)
    grads = torch.autograd.grad(value, rows)
    return {"value": value.detach(), **{str(i): grad for i, grad in enumerate(grads)}}


def with_targets(loss, targets, **options):
    return lambda anchors, candidates: loss(anchors, candidates, targets, **options)


@pytest.mark.parametrize("name", ["InfoNCELoss", *VIEWS, "VCRegLoss"])
def test_has_the_attributes(name, theirs):
    mine, peer = getattr(ours, name)(), getattr(theirs, name)()
    public = {key for key in vars(peer) if not key.startswith("_")}
    assert public == {key for key in vars(mine) if not key.startswith("_")}
    assert all(getattr(mine, key) == getattr(peer, key) for key in public)
    assert [key for key, _ in mine.named_modules()] == [key for key, _ in peer.named_modules()]
    assert isinstance(mine, ours.InfoNCELoss) == isinstance(peer, theirs.InfoNCELoss)


def test_other_names_are_the_peers(theirs):
    assert ours.BYOLLoss is theirs.BYOLLoss
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        ours.Nothing  # noqa: B018


def test_a_temperature_that_is_trained_is_in_the_state(theirs):
    states = []
    for module in (ours, theirs):
        loss = module.CLIPLoss()
        loss.temperature = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
        for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss):
            twin.zero_grad()
            twin(*views()).backward()
            states.append({"state": twin.state_dict()["temperature"], "grad": twin.temperature.grad})
    assert all(difference(state, states[-1]) <= TOLERANCE for state in states)


# Targets and masks


@PATHS
def test_no_target_counts(largest, theirs):
    """The mean over nothing: NaN, whose gradient is 0."""
    targets = torch.full((7,), -100)
    with _small.largest(largest):
        found = differentiated(with_targets(ours.InfoNCELoss(), targets), views())
    expected = differentiated(with_targets(theirs.InfoNCELoss(), targets), views())
    assert found["value"].isnan() and found["0"].abs().max() == found["1"].abs().max() == 0
    assert difference(found, expected) == 0


REFUSED = {
    "too-large": (torch.tensor([0, 1, 2, 3, 4, 5, 7]), IndexError),
    "negative": (torch.tensor([0, 1, 2, 3, 4, 5, -1]), IndexError),
    "too-few": (torch.arange(6), ValueError),
}


@PATHS
@pytest.mark.parametrize(("targets", "kind"), REFUSED.values(), ids=REFUSED)
def test_refuses_targets(targets, kind, largest, theirs):
    for module in (ours, theirs):
        with _small.largest(largest), pytest.raises(kind):
            module.InfoNCELoss()(*views(), targets)


@pytest.mark.parametrize("name", [*VIEWS, "VCRegLoss"])
def test_no_rows_have_no_mean(name, theirs):
    for module in (ours, theirs):
        rows = views(0)[: 1 if name == "VCRegLoss" else 2]
        loss = getattr(module, name)()(*rows)
        assert loss.isnan()
        if module is ours:
            assert all(grad.shape == (0, 6) for grad in torch.autograd.grad(loss, rows))


@PATHS
@pytest.mark.parametrize("name", VIEWS)
def test_beside_another_default_device(name, largest):
    """What a loss makes is where the rows are."""
    rows = views()
    with _small.largest(largest), torch.device("meta"):
        found = getattr(ours, name)()(*rows)
    torch.testing.assert_close(found, getattr(ours, name)()(*rows))


@PATHS
@pytest.mark.parametrize("name", ["NTXEntLoss", "VICRegLoss"])
def test_views_of_two_dtypes(name, largest, theirs):
    rows = [views()[0], views(dtype=torch.float32, seed=1)[1]]
    with _small.largest(largest):
        found = differentiated(getattr(ours, name)(), rows)
    assert difference(found, differentiated(getattr(theirs, name)(), rows)) <= 1e-6


def test_refuses_views_of_different_sizes(theirs):
    first, second = views()
    for module in (ours, theirs):
        with pytest.raises(AssertionError):
            module.BarlowTwinsLoss()(first[:, :5], second)
        with pytest.raises(ValueError):  # noqa: PT011, the text is each library's own
            module.CLIPLoss()(first[:5], second)


@pytest.mark.parametrize(
    ("what", "call"),
    {
        "mask": lambda rows: ours.InfoNCELoss()(*rows, torch.arange(7), torch.zeros(7, 7, dtype=torch.bool)),
        "targets that are no indices": lambda rows: ours.InfoNCELoss()(*rows, torch.eye(7, dtype=torch.float64)),
        "a logit_scale of several numbers": lambda rows: ours.CLIPLoss()(*rows, torch.ones(7)),
    }.items(),
)
def test_what_stores_the_matrix_warns_once(what, call, monkeypatch):
    monkeypatch.setattr("contrastive_kernels.compat._peer._warned", set())
    with pytest.warns(UserWarning, match=f"{what} stores the N x N matrix"):
        call(views())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(views())


# Numbers


@PATHS
@pytest.mark.parametrize("name", ["InfoNCELoss", *VIEWS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_the_value_of_its_rows(name, dtype, largest, theirs):
    losses = [getattr(module, name)() for module in (ours, theirs)]
    if name == "InfoNCELoss":
        losses = [with_targets(loss, torch.arange(11, -1, -1)) for loss in losses]
    rows = views(12, 8, dtype)
    with _small.largest(largest):
        found = differentiated(losses[0], rows)
    expected = differentiated(losses[1], [x.detach().double().requires_grad_() for x in rows])
    assert found["value"].dtype == torch.float32
    torch.testing.assert_close(found["value"].double(), expected["value"], rtol=1e-2, atol=1e-2)
    for i in "01":
        assert (found[i].double() - expected[i]).norm() <= 2e-2 * expected[i].norm()


@PATHS
@pytest.mark.parametrize("name", ["NTXEntLoss", "CLIPLoss"])
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


def compiled_calls():
    targets = torch.tensor([3, 1, -100, 0, 2, 6, 5])
    calls = {name: getattr(ours, name)() for name in VIEWS}
    calls["InfoNCELoss"] = with_targets(ours.InfoNCELoss(), targets)
    calls["mask"] = with_targets(ours.InfoNCELoss(), targets, mask=torch.zeros(7, 7, dtype=torch.bool))
    return calls


@pytest.mark.parametrize("name", compiled_calls())
@pytest.mark.filterwarnings("ignore:InfoNCELoss")
def test_compiles(name):
    call, rows = compiled_calls()[name], views()
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert difference(differentiated(compiled, rows), differentiated(call, rows)) <= TOLERANCE


# Several processes

GATHERED = {
    "info_nce": lambda m: with_targets(m.InfoNCELoss(), torch.arange(5)),
    "nt_xent": lambda m: m.NTXEntLoss(0.3),
    "clip": lambda m: m.CLIPLoss(0.2),
    "clip-scales": lambda m: lambda x, y: m.CLIPLoss()(x, y, torch.linspace(0.5, 1, 15, dtype=torch.float64)),
    "barlow": lambda m: m.BarlowTwinsLoss(0.02),
    "vicreg": lambda m: m.VICRegLoss(1.0, 2.0, 3.0),
    "vcreg": lambda m: lambda x, y: m.VCRegLoss()(x) - m.VCRegLoss()(y),
}


def on_a_rank(group, name):
    """Return value and gradients, ours and the peer's, where every rank weighs its loss otherwise."""
    found = []
    for module in adapters.modules("stable_pretraining"):
        rows, loss = views(5, seed=dist.get_rank()), GATHERED[name](module)
        value = loss(*rows)
        (value * (1 + dist.get_rank())).backward()
        found.append({"value": value.detach(), "0": rows[0].grad, "1": rows[1].grad})
    return found


@pytest.mark.parametrize("name", GATHERED)
@pytest.mark.filterwarnings("ignore:CLIPLoss")
def test_gathers_as_the_peer(name, ranks):
    for mine, peer in ranks.run(3, on_a_rank, name):
        assert difference(mine, peer) <= TOLERANCE
