"""What the cases of solo-learn do not say, beside the installed release."""

import pytest
import torch

from contrastive_kernels.compat import _small
from tests.support import adapters

adapters.require_peers()
pytestmark = pytest.mark.peers

solo, peer = adapters.modules("solo")


def test_other_names():
    assert solo.byol_loss_func is peer.byol_loss_func
    assert solo.DINOLoss is peer.DINOLoss
    with pytest.raises(AttributeError, match="no_loss_func"):
        _ = solo.no_loss_func


@pytest.mark.parametrize("largest", [0, _small._largest], ids=["sweep", "formula"])
@pytest.mark.parametrize("positional", [True, False])
def test_two_views(largest, positional):
    """The call of older releases, of two views by position, does what it did."""
    views = torch.randn(2, 9, 5, dtype=torch.float64)
    options = (0.3,) if positional else ()
    named = {} if positional else {"temperature": 0.3}
    with _small.largest(largest):
        torch.testing.assert_close(
            solo.simclr_loss_func(*views, *options, **named), peer.simclr_loss_func(*views, *options, **named)
        )


def test_errors():
    for module in (solo, peer):
        with pytest.raises(ValueError, match=r"more than 1 value|2 rows"):
            module.barlow_loss_func(torch.randn(1, 5), torch.randn(1, 5))


@pytest.mark.parametrize("name", ["nnclr_loss_func", "barlow_loss_func", "vicreg_loss_func"])
def test_float32(name):
    z1, z2 = torch.randn(300, 16), torch.randn(300, 16)
    torch.testing.assert_close(getattr(solo, name)(z1, z2), getattr(peer, name)(z1, z2), rtol=1e-5, atol=1e-6)
