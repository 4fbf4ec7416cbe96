"""The histogram of distances and the count inside a band against dense ones, and by hand."""

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
