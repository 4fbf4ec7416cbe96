"""The cost model of the GPU: what it must not claim, and what it says of the changes it is there to judge."""

import pytest

from benchmarks import gpu_model
from benchmarks.gpu_model import AFTER, BEFORE, LOSSES, MIB, step
from contrastive_kernels.engine.backends.triton import tiles

DIMS = (128, 256, 512, 1024)
# Products of 2·N·M·D FLOP and exponentials of a pair that no kernel without a stored matrix avoids.
LEAST = {"clip": (4, 2), "nt_xent": (2, 1), "info_nce": (4, 2), "siglip": (3, 1)}


@pytest.mark.parametrize("design", [BEFORE, AFTER], ids=["before", "after"])
@pytest.mark.parametrize("loss", LEAST)
@pytest.mark.parametrize("d", DIMS)
def test_no_faster_than_the_device(loss, d, design):
    """A prediction takes longer than its products at the full rate, and than its exponentials."""
    products, exponentials = LEAST[loss]
    cycles = 32768**2 * max(products * 2 * d / gpu_model.FLOP, exponentials / gpu_model.SPECIAL)
    found = step(loss, 32768, 32768, d, design)
    assert found.device > cycles / gpu_model.PROCESSORS / gpu_model.CLOCK


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("n", [4096, 32768, 65536])
def test_no_change_is_for_the_worse(loss, d, n):
    assert step(loss, n, n, d, AFTER).total <= step(loss, n, n, d, BEFORE).total


@pytest.mark.parametrize(("design", "bytes_per_pair"), [(BEFORE, 8 * 512 / 256), (AFTER, 16 * 512 / 16384)])
def test_traffic_of_chunks(design, bytes_per_pair):
    """8·D/c bytes a pair for strips of c rows, 256 at a million rows and 512 MB, 16·D/c for squares of c = 16,384."""
    n = 2**20
    assert step("clip", n, n, 512, design).traffic * gpu_model.MEMORY == pytest.approx(bytes_per_pair * n**2)


def test_few_rows_against_many():
    """Without shared walks two programs work on 256 queries, the rest of the device idles."""
    lone, shared = (step("moco", 256, 65536, 128, design).gradients for design in (BEFORE, AFTER))
    walk = 512 * BEFORE.kernel("row gradient", 128).cycles(128, alone=True) / gpu_model.CLOCK
    assert lone == pytest.approx(walk)
    assert 20 < lone / shared < gpu_model.PROCESSORS


def test_less_memory_takes_longer():
    free, limited = (step("clip", 65536, 65536, 512, BEFORE, limit) for limit in (512 * MIB, 128 * MIB))
    assert limited.traffic == pytest.approx(4 * free.traffic)
    assert limited.gradients == free.gradients


ROWS = {
    "sums": "sums", "symmetric sums": "sums", "row sums": "safe_sums", "gradient": "grad", "row gradient": "grad",
    "sigmoid gradient": "grad", "sigmoid total": "total", "weights": "weights", "row weights": "weights",
    "sigmoid weights": "weights",
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("d", DIMS)
def test_kernels_of_the_model_are_those_of_the_table(name, d):
    """The tile table of sm_90 has the tile that the model takes, of one design or the other."""
    row = tiles.find(ROWS[name], 90, 2, d, name in ("sigmoid total", "sigmoid weights"))
    found = [design.kernel(name, d) for design in (BEFORE, AFTER)]
    sides = {None if kernel is None else (kernel.height, kernel.width) for kernel in found}
    assert (None if row is None else (row.height, row.width)) in sides
