"""The histogram of distances and the count inside a band against dense ones, and by hand."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from contrastive_kernels import diagnostics as dg
from tests.support.diagnostics import close


def pair_distances(z, y=None, ids=None, y_ids=None, same=False):
    """Return the distances of all pairs that count, as one vector."""
    columns, column_ids = (z, ids) if y is None else (y, y_ids)
    d = (1 - F.normalize(z) @ F.normalize(columns).T) / 2
    kept = torch.ones_like(d, dtype=torch.bool)
    if y is None:
        kept.fill_diagonal_(False)
    if ids is not None:
        equal = ids[:, None] == column_ids
        kept &= equal if same else ~equal
    return d[kept]


PAIRS = {
    "self": lambda: {},
    "ids": lambda: {"ids": torch.arange(61) // 3},
    "same": lambda: {"ids": torch.arange(61) // 8, "same": True},
    "rectangular": lambda: {"y": torch.randn(23, 4, dtype=torch.float64)},
    "rectangular ids": lambda: {
        "y": torch.randn(23, 4, dtype=torch.float64),
        "ids": torch.randint(9, (61,)),
        "y_ids": torch.randint(9, (23,)),
    },
}


@pytest.mark.parametrize("pairs", PAIRS)
def test_distance_histogram_and_band_count(pairs):
    z, options = torch.randn(61, 4, dtype=torch.float64), PAIRS[pairs]()
    d = pair_distances(z, **options)
    found = dg.distance_histogram(z, bins=13, **options)
    assert found.counts.tolist() == torch.histc(d, 13, 0, 1).long().tolist()
    assert found.invalid == 0
    close(found.edges, torch.linspace(0, 1, 14, dtype=torch.float64))
    inside = dg.band_count(z, lower=0.3, upper=0.45, **options)
    assert inside.count == ((d > 0.3) & (d < 0.45)).sum() > 0
    assert inside.pairs == len(d) == found.counts.sum()
    close(inside.fraction, inside.count.double() / len(d))


def test_distances_at_the_edges():
    """Equal and opposite rows fall into the first and last bin; the ends of the band are outside."""
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert dg.distance_histogram(z, bins=4).counts.tolist() == [2, 0, 6, 4]
    assert dg.band_count(z, lower=0.0, upper=0.5).count == 0
    assert dg.band_count(z, lower=0.4, upper=1.0).count == 6
    z[3, 0] = torch.nan
    found = dg.distance_histogram(z, bins=4)
    assert (found.counts.sum(), found.invalid) == (6, 6)
    lonely = dg.band_count(z[:1])
    assert lonely.pairs == 0 and lonely.fraction == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_have_no_distance(dtype):
    """Their product may be a rounding below 1, which would be inside a band that begins at 0."""
    z = torch.randn(50, 37, dtype=dtype).repeat(4, 1)
    ids = torch.arange(50).repeat(4)
    options = dict(ids=ids, same=True)
    assert dg.band_count(z, lower=0.0, upper=0.5, **options).count == 0
    assert dg.band_count(z, z, lower=0.0, upper=0.5, y_ids=ids, **options).count == 0
    assert dg.distance_histogram(z, bins=10**6, **options).counts[0] == 50 * 4 * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bins", [1, 3, 10, 49, 50, 103, 1000])
def test_an_edge_belongs_to_the_bin_above(bins, dtype):
    """The distances that are the edges themselves, and their neighbours, are where the edges say."""
    edges = dg.distance_histogram(torch.eye(2, dtype=dtype), bins=bins).edges
    assert edges[0] == 0 and edges[-1] == 1 and (edges.diff() > 0).all()
    close(edges, torch.linspace(0, 1, bins + 1, dtype=torch.float64), rtol=2 * torch.finfo(dtype).eps)
    below, above = edges.nextafter(torch.tensor(-1.0, dtype=dtype)), edges.nextafter(torch.tensor(2.0, dtype=dtype))
    for distances in (edges, below[1:], above[:-1]):
        # rows of one number: the distance of s to 1 is (1 - s) / 2, exact where 1 - 2 d is
        s = 1 - 2 * distances
        d = (1 - s) / 2
        counts = dg.distance_histogram(s[:, None], torch.ones(1, 1, dtype=dtype), bins=bins, normalize=False).counts
        expected = torch.stack([((lower <= d) & (d < upper)).sum() for lower, upper in pairwise(edges)])
        expected[-1] += (d == 1).sum()
        assert counts.tolist() == expected.tolist()


def test_distances_outside_the_range():
    """Raw rows have distances below 0 and above 1, which go to the first and last bin; infinity is no distance."""
    z, y = torch.tensor([[3.0], [-3.0], [torch.inf], [-torch.inf], [torch.nan]]), torch.ones(1, 1)
    found = dg.distance_histogram(z, y, bins=4, normalize=False)
    assert found.counts.tolist() == [1, 0, 0, 1] and found.invalid == 3
    band = dg.band_count(z, y, lower=0.1, upper=0.9, normalize=False)
    assert (band.count, band.pairs, band.invalid) == (0, 5, 3) and band.fraction.isnan()
    finite = dg.band_count(z[:2], y, lower=0.1, upper=0.9, normalize=False)
    assert (finite.pairs, finite.invalid, finite.fraction) == (2, 0, 0)


def test_no_rows():
    z = torch.ones(5, 3)
    for x, y in ((z, z[:0]), (z[:0], z), (z[:0], None)):
        assert dg.band_count(x, y).pairs == 0
        assert not dg.distance_histogram(x, y, bins=3).counts.any()


def test_what_is_left_out_is_not_invalid():
    z = torch.randn(6, 3)
    z[5] = torch.nan
    ids = torch.tensor([0, 0, 1, 1, 1, 2])
    assert dg.distance_histogram(z, ids=ids, same=True).invalid == 0
    assert dg.band_count(z, ids=ids, same=True).invalid == 0
    assert dg.band_count(z, ids=ids).invalid == dg.distance_histogram(z, ids=ids).invalid == 10
