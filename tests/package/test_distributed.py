"""The programs for several processes: the example and the benchmark."""

import csv
import io
import socket
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch.distributed as dist

for package in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(package)

from rich.console import Console  # noqa: E402

import contrastive_kernels as ck  # noqa: E402
from benchmarks import distributed as benchmark  # noqa: E402
from benchmarks.eager import Unavailable  # noqa: E402
from benchmarks.peers import Peer  # noqa: E402
from benchmarks.ranks import joined  # noqa: E402
from contrastive_kernels.engine.backends import cpp  # noqa: E402
from examples import distributed as example  # noqa: E402
from tests.support.benchmarks import row  # noqa: E402

# Shares of 44, 43 and 43 rows.
OPTIONS = ["--steps", "3", "--batch-size", "130"]


def train(group, options):
    return example.main(options)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_ranks_train_as_one_process(wrapper, ranks, tmp_path):
    options = [*OPTIONS, "--output", str(tmp_path), *["--fsdp"] * (wrapper == "fsdp")]
    first, *others = ranks.run(3, train, options)
    assert list(first) == [example.ONE, example.ALL, example.OWN]
    assert example.difference(first) < 1e-5
    assert first[example.ALL].accuracy == pytest.approx(first[example.ONE].accuracy, abs=0.005)
    # a third of the negatives: about log 3 less
    one, own = (np.array(first[name].losses) for name in (example.ONE, example.OWN))
    assert len(one) == 3
    assert (one - own > 0.5).all()
    for runs in others:
        assert {name: run.losses for name, run in runs.items()} == {
            name: first[name].losses for name in (example.ALL, example.OWN)
        }
    assert (tmp_path / "distributed.png").read_bytes().startswith(b"\x89PNG")


def test_example_in_one_process(tmp_path, capsys):
    runs = example.main(["--steps", "1", "--batch-size", "32", "--output", str(tmp_path)])
    assert runs[example.ONE].losses == runs[example.ALL].losses == runs[example.OWN].losses
    out = capsys.readouterr().out
    assert "One process: there is nobody to gather from" in out and "torchrun --nproc-per-node 2" in out
    assert not dist.is_initialized()


def test_a_rank_of_torchrun_joins_its_group(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR"), joined():
        pass
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with joined():
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
        with joined():  # what is there already stays
            pass
        assert dist.is_initialized()
    assert not dist.is_initialized()


# The benchmark


def right(image_features, text_features, logit_scale):
    return ck.clip_loss(image_features, text_features, logit_scale, group="world")


def ungathered(image_features, text_features, logit_scale):
    return ck.clip_loss(image_features, text_features, logit_scale)


def broken(image_features, text_features, logit_scale):
    raise RuntimeError("no such device\nand more")


def measure(group, options):
    """Run the benchmark with stand-ins for the peers."""
    calls = []

    def late(*features):
        calls.append(len(features))
        if len(calls) > 2:  # the check and the measurement of memory
            raise RuntimeError("lost its device")
        return right(*features)

    functions = {"right": right, "ungathered": ungathered, "broken": broken, "late": late}
    peers = {
        name: Peer("torch", "torch", {"clip": lambda f=function, **inputs: f(*inputs.values())})
        for name, function in functions.items()
    }
    peers["absent"] = Peer("no_such_package", "no-such-package", {"clip": right})
    with (
        patch.dict(benchmark.PEERS, peers, clear=True),
        patch.object(benchmark, "PROVIDERS", (benchmark.OURS, benchmark.ONE, *peers)),
    ):
        return benchmark.main(options)


@pytest.fixture(scope="module")
def measured(ranks, tmp_path_factory):
    """Return the rows of the benchmark's CSV on three ranks, and the folder."""
    folder = tmp_path_factory.mktemp("distributed")
    options = ["--sizes", "48", "96", "144", "50", "--dims", "8", "--seconds", "0", "--min-rounds", "2"]
    losses = ["--losses", "clip", "nt_xent"]
    assert ranks.run(3, measure, [*options, *losses, "--output", str(folder)]) == [0, 0, 0]
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file)), folder


def test_benchmark_times_ranks_and_one_process(measured):
    rows, folder = measured
    for loss in ("clip", "nt_xent"):
        for n in ("48", "96", "144"):
            mine = [found for found in rows if (found["loss"], found["n"], found["mode"]) == (loss, n, "both")]
            timed = {found["provider"]: found["ranks"] for found in mine if found["ms_50"]}
            assert timed == {"ours": "3", "one-process": "1", **({"right": "3"} if loss == "clip" else {})}
            for found in mine:
                assert not found["ms_50"] or (0 < float(found["ms_20"]) <= float(found["ms_80"]))
    assert {file.name for file in folder.iterdir()} == {"results.csv", "results.json", "scaling-d8-float32.png"}


def test_benchmark_peer_costs_its_own_row_only(measured):
    notes = {found["provider"]: found["note"] for found in measured[0] if (found["loss"], found["n"]) == ("clip", "96")}
    assert notes["ours"] == notes["one-process"] == notes["right"] == ""
    assert "differs from float64" in notes["ungathered"] and "gradient" in notes["ungathered"]
    assert notes["broken"] == "RuntimeError: no such device"
    assert notes["late"] == "RuntimeError: lost its device"
    assert notes["absent"] == "no_such_package is not installed"


def test_benchmark_refuses_unequal_shares(measured):
    notes = {found["note"] for found in measured[0] if found["n"] == "50"}
    assert notes == {"N = 50 gives 3 ranks no equal shares of pairs"}


def test_without_the_extension_nothing_is_timed_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpp, "missing", "not built here")
    options = ["--losses", "clip", "--sizes", "16", "--dims", "8", "--providers", "ours", "--seconds", "0"]
    options += ["--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        benchmark.main(options)
    assert "not built here; or ask for it with --without-cpp" in capsys.readouterr().err
    assert not dist.is_initialized()
    monkeypatch.setattr(cpp, "_warned", True)
    assert benchmark.main([*options, "--without-cpp"]) == 0


def raise_on_one_rank(group, raises):
    def result():
        return dist.get_rank() // (0 if dist.get_rank() == raises else 1)

    try:
        return benchmark.on_all_ranks(result)
    except Unavailable as reason:
        return str(reason)


def test_what_one_rank_raises_all_raise(ranks):
    assert ranks.run(3, raise_on_one_rank, 1) == ["ZeroDivisionError: integer division or modulo by zero"] * 3
    assert ranks.run(3, raise_on_one_rank, None) == [[0, 1, 2]] * 3


def test_efficiency_is_the_time_of_one_process_over_that_of_all():
    ours, one = row(ms=6.0, ranks=2), row(provider=benchmark.ONE, ms=9.0)
    elsewhere = row(provider=benchmark.ONE, ms=1.0, d=256)
    assert benchmark.efficiency(ours, [elsewhere, one, ours]) == 0.75
    assert benchmark.efficiency(one, [one, ours]) is None
    assert benchmark.efficiency(ours, [elsewhere, ours]) is None
    peer = row(provider="open_clip", ms=12.0, ranks=2, mib=3000.0, version="3.3.0")
    forward = [replace(found, mode="fwd") for found in (ours, one, peer)]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(benchmark.main_table([ours, one, peer, *forward]))
    text = console.export_text()
    assert "open_clip 3.3.0" in text
    cells = [line.split() for line in text.splitlines()]
    assert ["ours", "6", "6", "(6–6)", "1.00", "100.0", "75%"] in cells
    assert ["one-process", "9", "9", "(9–9)", "1.50", "100.0"] in cells
    assert ["open_clip", "12", "12", "(12–12)", "2.00", "3,000.0", "38%"] in cells
