"""The benchmark of the adapters: its extrapolation and table, and one measurement beside an installed library."""

import math

import pytest
from rich.console import Console

from benchmarks import adapters, report
from contrastive_kernels.engine.backends import cpp
from tests.support import adapters as support


def row(provider, n, ms, mib):
    return adapters.Row(
        loss="library Loss",
        provider=provider,
        mode="both",
        n=n,
        m=n,
        d=128,
        dtype="float32",
        device="",
        threads=1,
        ms_50=ms,
        ms_20=ms,
        ms_80=ms,
        peak_mib=mib,
        tflops=None,
        matmul_fraction=None,
        torch="",
        triton="",
        commit="",
        date="",
        note="",
    )


def test_largest_batch():
    """Ours grows with N beside its inputs and gradients, the original with N²."""
    n, limit = 1024, 1.0
    held = 4 * n * 128 * 4 / 2**20
    ours = adapters.largest_batch(row(adapters.OURS, n, 1.0, held), limit)
    assert math.isclose(ours, n * 1024 / (2 * held))
    original = adapters.largest_batch(row(adapters.ORIGINAL, n, 1.0, 20.0), limit)
    factor = original / n
    assert math.isclose(20 * factor**2 + held * factor, 1024)


def test_table():
    rows = [row(adapters.OURS, 64, 2.0, 1.0), row(adapters.ORIGINAL, 64, 3.0, 5.0), row(adapters.OURS, 128, 2.0, 1.0)]
    console = Console(width=120, record=True)
    console.print(adapters.table(rows, 8.0))
    assert "1.50" in console.export_text()


def test_picture(tmp_path):
    rows = [row(provider, n, 2.0 + k, 5.0) for k, provider in enumerate(("ours", "original")) for n in (64, 128)]
    assert adapters.draw(rows, tmp_path).read_bytes().startswith(b"\x89PNG")


def test_without_the_extension_nothing_is_timed_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpp, "missing", "not built here")
    with pytest.raises(SystemExit):
        adapters.main(["--output", str(tmp_path)])
    assert "not built here; or ask for it with --without-cpp" in capsys.readouterr().err


@pytest.mark.peers
def test_measures(tmp_path):
    pytest.importorskip("info_nce")
    arguments = ["--libraries", "info_nce", "--sizes", "32", "--seconds", "0", "--output", str(tmp_path)]
    assert adapters.main(arguments) == 0
    timed = report.timed(report.read(tmp_path))
    assert {r.provider for r in timed} == {adapters.OURS, adapters.ORIGINAL}


@pytest.mark.peers
@pytest.mark.parametrize("adapter", adapters.ADAPTERS, ids=str)
def test_is_the_same_loss(adapter):
    pytest.importorskip("info_nce")
    assert adapters.disagreement(adapter, *support.modules(adapter.module)) <= adapters.tolerance(adapter)
