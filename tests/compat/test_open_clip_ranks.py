"""open_clip's losses on several processes, in every mode beside open_clip's own."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist

from contrastive_kernels.compat import _peer
from contrastive_kernels.compat.check.case import TOLERANCE, difference
from tests.support import adapters
from tests.support.open_clip import inputs, made, ours, result, theirs

pytestmark = pytest.mark.peers


def gathered(group, name, options, n, module):
    """Return value, gradients and the sum of the gradients' averages over the ranks, by ours or theirs."""
    del group
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = inputs(name, n * world)
    own = {
        key: x.detach()[rank * n : (rank + 1) * n].requires_grad_(x.requires_grad) if x.dim() else x
        for key, x in whole.items()
    }
    loss = made({"ours": ours, "theirs": theirs}[module], name)
    # read at every call
    for key, value in {**options, "rank": rank, "world_size": world}.items():
        setattr(loss, key, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return result(loss, own)


def stored(group, name, options):
    """Raise if a rank holds a matrix of its similarities."""
    del group
    rank, world = dist.get_rank(), dist.get_world_size()
    n = 700
    loss = made(ours, name, rank=rank, world_size=world, **options)
    with adapters.NoMatrix(math.isqrt(n * n)):
        result(loss, inputs(name, n, torch.float32, 32))


def imported(group):
    """Import what the tests of several processes need, which takes a while."""
    del group


@pytest.fixture(scope="module")
def processes(ranks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.support.ranks.PATIENCE", 300)
        ranks.run(3, imported)
    return ranks


MODES = [dict(local_loss=local, gather_with_grad=grad) for local in (False, True) for grad in (False, True)]
GATHERED = [
    *[(name, mode) for name in ("ClipLoss", "CoCaLoss", "DistillClipLoss") for mode in MODES],
    *[("SigLipLoss", {"dist_impl": kind}) for kind in ("bidir", "shift", "reduce", "gather")],
]


@pytest.mark.parametrize(("name", "options"), GATHERED, ids=str)
def test_several_processes(processes, name, options):
    """Value and gradients of every rank are those of the peer, in both directions of a ring of three."""
    for n in (1, 5):
        found = processes.run(3, gathered, name, options, n, "ours")
        expected = processes.run(3, gathered, name, options, n, "theirs")
        for mine, peer in zip(found, expected, strict=True):
            assert difference(mine, peer) <= TOLERANCE


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_gradients_against_the_whole_batch(processes, mode):
    """Which modes give, averaged over the ranks, the gradient of all rows: those that cross ranks."""
    n, world = 4, 3
    found = processes.run(world, gathered, "ClipLoss", mode, n, "ours")
    whole = result(ours.ClipLoss(), inputs("ClipLoss", n * world))
    mean = sum(part["contrastive_loss"] for part in found) / world
    torch.testing.assert_close(mean, whole["contrastive_loss"])
    image = torch.cat([part["gradient of image_features"] for part in found]) / world
    exact = whole["gradient of image_features"]
    # every rank that has the whole loss adds its share to a row that belongs to one
    apart = float((image - exact).abs().max() / exact.abs().max())
    assert (apart < 1e-12) == mode["gather_with_grad"]
    if not mode["gather_with_grad"] and not mode["local_loss"]:
        torch.testing.assert_close(image * world, exact)


@pytest.mark.parametrize(("name", "options"), [g for g in GATHERED if g[0] in ("ClipLoss", "SigLipLoss")], ids=str)
def test_several_processes_store_no_matrix(processes, name, options):
    processes.run(3, stored, name, options)


def test_distillation_of_several_processes_warns():
    _peer._warned.discard(("DistillClipLoss", "world_size > 1"))
    loss = ours.DistillClipLoss(world_size=2)
    for expected in (pytest.warns(UserWarning, match="DistillClipLoss with world_size > 1 stores"), None):
        with expected or warnings.catch_warnings():
            if expected is None:
                warnings.simplefilter("error")
            with pytest.raises(ValueError, match="process group"):
                loss(**inputs("DistillClipLoss"))
