"""info-nce-pytorch: what the cases of the self-test cannot say."""

import copy
import pickle

import pytest
import torch

from contrastive_kernels.compat import _peer, _small
from contrastive_kernels.compat.check.case import TOLERANCE, difference
from tests.support import adapters

adapters.require_peers()
pytestmark = pytest.mark.peers

ours, theirs = adapters.modules("info_nce")

PATHS = pytest.mark.parametrize("largest", [0, _small._largest], ids=["sweep", "formula"])
# None: the other rows' keys
NEGATIVES = {"in-batch": None, "unpaired": (7, 6), "paired": (9, 7, 6), "no": (0, 6)}
EACH = pytest.mark.parametrize("negatives", NEGATIVES)


def inputs(negatives, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 6), (9, 6), NEGATIVES[negatives]]
    return [
        shape and torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def mode(negatives):
    return "paired" if negatives == "paired" else "unpaired"


def result(module, given, **options):
    """Return value and gradients."""
    loss = module.InfoNCE(**options)(*given)
    leaves = [x for x in given if x is not None and x.requires_grad]
    grads = torch.autograd.grad(loss.sum(), leaves)
    return {"loss": loss.detach()} | {f"gradient {i}": grad for i, grad in enumerate(grads)}


@PATHS
@EACH
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_option(negatives, reduction, largest):
    options = dict(temperature=0.3, reduction=reduction, negative_mode=mode(negatives))
    given = inputs(negatives)
    with _small.largest(largest):
        found = result(ours, given, **options)
    assert difference(found, result(theirs, given, **options)) <= TOLERANCE


@PATHS
def test_attributes_are_read_at_every_call(largest):
    query, key, _ = inputs("in-batch")
    loss, peer = ours.InfoNCE(), theirs.InfoNCE()
    for module in (loss, peer):
        module.temperature, module.reduction, module.negative_mode = 0.7, "none", "neither, without negatives"
    with _small.largest(largest):
        torch.testing.assert_close(loss(query, key), peer(query, key))


@PATHS
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_temperature_of_one_element(shape, largest):
    gradients = {}
    for module in (ours, theirs):
        temperature = torch.full(shape, 0.4, dtype=torch.float64, requires_grad=True)
        with _small.largest(largest):
            loss = module.InfoNCE(temperature)(*inputs("unpaired"))
        (gradients[module],) = torch.autograd.grad(loss, temperature)
    torch.testing.assert_close(gradients[ours], gradients[theirs])


def test_temperature_that_is_trained():
    """A parameter is one of the module, and in its state."""
    loss, peer = (module.InfoNCE(torch.nn.Parameter(torch.tensor(0.4))) for module in (ours, theirs))
    assert loss.load_state_dict(peer.state_dict()).missing_keys == []
    for module in (loss, peer):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            module(*inputs("in-batch", torch.float32)).backward()
            optimizer.step()
    assert loss.temperature != 0.4
    torch.testing.assert_close(loss.state_dict(), peer.state_dict())
    assert peer.load_state_dict(loss.state_dict()).missing_keys == []


def test_temperature_of_several_numbers_warns_once():
    _peer._warned.clear()
    query, key, _ = inputs("in-batch")
    temperature = torch.linspace(0.1, 1, 9).double()[:, None]
    with pytest.warns(UserWarning, match="several numbers stores"):
        found = ours.info_nce(query, key, temperature=temperature)
    torch.testing.assert_close(found, theirs.info_nce(query, key, temperature=temperature))


@PATHS
def test_rows_of_zeros(largest):
    """The same value; the gradient is 0 and not divided by 1e-12."""
    query, key, _ = inputs("in-batch")
    query = query.detach().index_fill(0, torch.tensor([3]), 0.0).requires_grad_()
    with _small.largest(largest):
        found = result(ours, [query, key, None])
    expected = result(theirs, [query, key, None])
    torch.testing.assert_close(found["loss"], expected["loss"])
    assert expected["gradient 0"][3].abs().max() > 1e9
    assert not found["gradient 0"][3].any()
    others = torch.arange(9) != 3
    torch.testing.assert_close(found["gradient 0"][others], expected["gradient 0"][others])


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(negatives, dtype):
    """A float32 loss, and gradients, within the rounding of unit rows of that dtype."""
    given = inputs(negatives, dtype)
    wide = [x if x is None else x.detach().double().requires_grad_() for x in given]
    found, expected = (result(m, x, negative_mode=mode(negatives)) for m, x in ((ours, given), (theirs, wide)))
    assert found["loss"].dtype == torch.float32
    for name, value in found.items():
        bound = 20 * torch.finfo(dtype).eps * expected[name].abs().amax().clamp(min=1) if value.numel() else 0
        assert not value.numel() or (value - expected[name]).abs().max() <= bound, name


@EACH
def test_compiles(negatives):
    torch._dynamo.reset()
    given = inputs(negatives)
    compiled = torch.compile(ours.InfoNCE(negative_mode=mode(negatives)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), theirs.InfoNCE(negative_mode=mode(negatives))(*given))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies(copied):
    loss = copied(ours.InfoNCE(0.3, "none", "paired"))
    assert vars(loss).keys() == vars(theirs.InfoNCE()).keys()
    torch.testing.assert_close(loss(*inputs("paired")), theirs.InfoNCE(0.3, "none", "paired")(*inputs("paired")))


def _misuse():
    x = torch.randn(4, 3)
    wider = torch.randn(4, 2)
    return {
        "query of one dimension": (x[0], x),
        "key of three dimensions": (x, x[:, None]),
        "rows of the key": (x, x[:2]),
        "width of the key": (x, wider),
        "width of the negatives": (x, x, wider),
        "dimensions of unpaired negatives": (x, x, x[:, None]),
        "dimensions of paired negatives": (x, x, x, 0.1, "mean", "paired"),
        "rows of paired negatives": (x, x, x[:2, None], 0.1, "mean", "paired"),
        "width of paired negatives": (x, x, wider[:, None], 0.1, "mean", "paired"),
        "reduction": (x, x, None, 0.1, "median"),
    }


@PATHS
@pytest.mark.parametrize("what", _misuse())
def test_misuse(what, largest):
    for module in (ours, theirs):
        with _small.largest(largest), pytest.raises(ValueError, match=r"."):
            module.info_nce(*_misuse()[what])
