"""`min_view_similarity` against the dense reference, and on a tie."""

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from tests.support.primitives import DTYPES, compare
from tests.support.testing import device_of, dtype_id


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("reduce", ["min", "mean"])
@pytest.mark.parametrize("shape", [(1, 2, 1), (63, 3, 24), (129, 6, 100)], ids=lambda s: f"N{s[0]}-V{s[1]}-D{s[2]}")
def test_min_view_similarity(shape, reduce, dtype, backend, poison):
    """I3 ArCL limits: the closed form of the mean is the mean over pairs, the minimum that over j < k."""
    views = F.normalize(torch.randn(shape, dtype=torch.float64), dim=-1)

    def values(module, **arguments):
        return module.min_view_similarity(**arguments, reduce=reduce)[0]

    compare(values, {"views": views}, backend, dtype)
    if reduce == "min":
        views = views.to(dtype)
        pairs = ck.min_view_similarity(views.to(device_of(backend)), backend=backend)[1]
        assert pairs.dtype == torch.int64
        assert torch.equal(pairs.cpu(), python_ref.min_view_similarity(views.double())[1])


@pytest.mark.parametrize("place", [0, 2])
def test_a_long_view_leaves_the_digits_of_the_mean(place, backend):
    """It is a hundred thousand times as long as the others; its square is no part of the mean."""
    views = torch.randn(33, 4, 24, dtype=torch.float64)
    views[:, place] *= 1e5
    views = views.float()
    values, _ = ck.min_view_similarity(views.to(device_of(backend)), reduce="mean", backend=backend)
    expected, _ = python_ref.min_view_similarity(views.double(), reduce="mean")
    torch.testing.assert_close(values.cpu().double(), expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_min_view_similarity_takes_the_first_on_a_tie(backend):
    views = torch.eye(4, device=device_of(backend)).repeat(3, 1, 1).requires_grad_()
    values, pairs = ck.min_view_similarity(views, backend=backend)
    assert pairs.tolist() == [[0, 1]] * 3
    values.sum().backward()
    assert not views.grad[:, 2:].any()
    assert ck.min_view_similarity(views, reduce="mean", backend=backend)[1] is None
