"""Every case of every adapter beside its peer, in float64: values, gradients, signatures, and no N x N tensor."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from contrastive_kernels.compat import ADAPTERS, _small
from contrastive_kernels.compat.check.case import TOLERANCE, Draw, difference, outcome
from tests.support import adapters

adapters.require_peers()
pytestmark = pytest.mark.peers

ROWS = 2048  # of a matrix that must not be


@pytest.mark.parametrize("largest", [0, _small._largest], ids=["sweep", "formula"])
@pytest.mark.parametrize("n", [1, 7, 130])
@pytest.mark.parametrize(("name", "case"), adapters.cases())
def test_agrees(name, case, n, largest):
    ours, theirs = adapters.modules(name)
    try:
        expected = outcome(case, theirs, Draw(n))
    except Exception as error:
        with _small.largest(largest), pytest.raises(type(error)):
            outcome(case, ours, Draw(n))
        return
    with _small.largest(largest):
        found = outcome(case, ours, Draw(n))
    assert difference(found, expected) <= TOLERANCE, (found, expected)


@pytest.mark.parametrize(("name", "case"), adapters.cases())
def test_no_matrix(name, case):
    """Cases that only the peer's code computes say so in their text."""
    if "dense" in case.what:
        pytest.skip("computed by the peer")
    ours, _ = adapters.modules(name)
    with adapters.NoMatrix(ROWS):
        outcome(case, ours, Draw(ROWS, dtype=torch.float32))


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in adapters.NOT_INSTALLABLE])
def test_signatures(name):
    ours, theirs = adapters.modules(name)
    compared = 0
    for public in ours.__all__:
        ours_, theirs_ = getattr(ours, public), getattr(theirs, public, None)
        if theirs_ is None or not callable(theirs_) or public.startswith("patch_"):
            continue
        if (name, public) in adapters.OTHER_SIGNATURES:
            continue
        assert adapters.parameters(ours_) == adapters.parameters(theirs_), public
        if inspect.isclass(theirs_) and issubclass(theirs_, nn.Module):
            assert adapters.parameters(ours_.forward) == adapters.parameters(theirs_.forward), public
        compared += 1
    assert compared or name == "transformers" or not ours.__all__


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in adapters.NOT_INSTALLABLE])
def test_copies(name):
    """Modules that need no arguments can be pickled and copied, and have the peer's state."""
    ours, theirs = adapters.modules(name)
    for public in ours.__all__:
        cls = getattr(ours, public)
        if not inspect.isclass(cls) or not issubclass(cls, nn.Module):
            continue
        try:
            peer = getattr(theirs, public)()
        except TypeError:
            continue  # needs arguments
        for module in (cls(), copy.deepcopy(cls()), pickle.loads(pickle.dumps(cls()))):
            assert {k: v.shape for k, v in module.state_dict().items()} == {
                k: v.shape for k, v in peer.state_dict().items()
            }, public
            module.load_state_dict(peer.state_dict())
            assert type(module).__name__ == type(peer).__name__
