"""The command line of the benchmarks: what is written when, what is refused, what is said."""

import csv
import sys
from dataclasses import replace

import pytest
import torch

import benchmarks
from benchmarks import __main__ as command
from benchmarks import cases, run
from contrastive_kernels.engine.backends import cpp

pytestmark = pytest.mark.usefixtures("short_queue")
FAST = ["--seconds", "0", "--min-rounds", "1", "--providers", "ours", "--dims", "16"]


@pytest.fixture
def measured(tmp_path):
    """Return a function that runs the command into one folder; it returns the status."""

    def benchmark(*options):
        return command.main([*FAST, "--output", str(tmp_path), *options])

    return benchmark


def rows(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def timed(folder):
    return [(row["loss"], int(row["n"])) for row in rows(folder) if row["mode"] == "both" and row["ms_50"]]


def test_a_case_is_written_before_the_next_begins(measured, tmp_path, monkeypatch, capsys):
    """An interrupt, as any end of the process, loses the unfinished case only."""
    finished = []

    def measure_case(case, *arguments, whole=run.measure_case):
        if finished:
            assert timed(tmp_path) == [("clip", 64)]
            raise KeyboardInterrupt
        finished.append(case)
        return whole(case, *arguments)

    monkeypatch.setattr(run, "measure_case", measure_case)
    assert measured("--losses", "clip", "nt_xent", "--sizes", "64") == 130
    assert timed(tmp_path) == [("clip", 64)]
    out = capsys.readouterr().out
    assert "Interrupted" in out and "clip" in out.split("Interrupted")[1]


@pytest.mark.parametrize(
    ("loss", "size", "reason"), [("clip", "0", "two rows"), ("clip", "-4", "two rows"), ("nt_xent", "65", "odd")]
)
def test_a_bad_size_is_noted(loss, size, reason, measured, tmp_path, capsys):
    assert measured("--losses", loss, "--sizes", size, "128") == 0
    assert timed(tmp_path) == [(loss, 128)]
    (note,) = [row["note"] for row in rows(tmp_path) if row["n"] == size]
    assert reason in note
    assert "not timed: ours" in capsys.readouterr().out


def test_a_case_that_cannot_be_made_is_noted(measured, tmp_path, monkeypatch):
    def inputs(self, device, make=cases.Case.inputs):
        if self.n == 128:
            raise RuntimeError("not enough memory: you tried to allocate")
        return make(self, device)

    monkeypatch.setattr(cases.Case, "inputs", inputs)
    assert measured("--losses", "clip", "--sizes", "64", "128", "256") == 0
    assert timed(tmp_path) == [("clip", 64), ("clip", 256)]
    assert "not enough memory" in rows(tmp_path)[3]["note"]


def test_nothing_timed_is_a_failure(measured):
    assert measured("--losses", "clip", "--sizes", "0") == 1


def test_a_provider_that_raises_in_the_timing_is_noted(measured, tmp_path, monkeypatch):
    """It passed the check and the measurement of its memory; the others keep their times."""
    right, calls = cases.LOSSES["clip"], []

    def breaks(**inputs):
        calls.append(len(inputs["image_features"]))
        if calls.count(64) > 2:
            raise RuntimeError("lost its device")
        return right.ours(**inputs)

    monkeypatch.setitem(cases.LOSSES, "clip", replace(right, ours=breaks))
    assert measured("--losses", "clip", "--sizes", "64", "--min-rounds", "3", "--providers", "ours", "eager") == 0
    found = {row["provider"]: row for row in rows(tmp_path) if row["mode"] == "both"}
    assert found["ours"]["note"] == "RuntimeError: lost its device" and not found["ours"]["ms_50"]
    assert found["eager"]["ms_50"]


def test_earlier_results_are_kept_and_counted(measured, tmp_path, capsys):
    measured("--losses", "clip", "--sizes", "64", "128")
    measured("--losses", "clip", "nt_xent", "--sizes", "128")
    assert set(timed(tmp_path)) == {("clip", 64), ("clip", 128), ("nt_xent", 128)}
    assert "3 are kept and 3 replaced" in " ".join(capsys.readouterr().out.split())


def test_the_picture_shows_all_rows_of_the_folder(measured, tmp_path):
    """Neither run has the three sizes that a picture needs."""
    measured("--losses", "clip", "--sizes", "64")
    measured("--losses", "clip", "--sizes", "96", "128")
    assert (tmp_path / "scaling-d16-float32.png").exists()


@pytest.mark.parametrize("options", [
    ("--threads", "0"), ("--threads", "-1"), ("--seconds", "-1"), ("--seconds", "nan"), ("--min-rounds", "0"),
    ("--memory-limit", "-1"), ("--dims", "0"), ("--sizes", "many"), ("--device", "abacus"), ("--losses", "hinge"),
    ("--output", __file__),
], ids=" ".join)  # fmt: skip
def test_bad_options_are_named(options, measured, capsys):
    with pytest.raises(SystemExit) as stopped:
        measured("--losses", "clip", *options)
    assert stopped.value.code == 2
    assert f"{options[0]}" in capsys.readouterr().err.splitlines()[-1]


def test_results_that_cannot_be_read_are_not_replaced(measured, tmp_path, capsys):
    (tmp_path / "results.json").write_text('[{"loss": "clip"}]')
    with pytest.raises(SystemExit):
        measured("--losses", "clip", "--sizes", "64")
    assert "cannot be read" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == '[{"loss": "clip"}]'


def test_a_preset_names_what_it_ignores(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.PRESETS, "demo", [run.Grid(["clip"], [64], [8], [torch.float64], ["ours"])])
    assert measured("--preset", "demo", "--sizes", "128") == 0
    assert timed(tmp_path) == [("clip", 64)]
    assert "--preset demo ignores --sizes, --dims, --providers" in capsys.readouterr().out


def test_table_without_matplotlib(measured, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "benchmarks.plot", raising=False)
    monkeypatch.delattr(benchmarks, "plot", raising=False)
    assert measured("--losses", "clip", "--sizes", "64", "96", "128") == 0
    out = capsys.readouterr().out
    assert "of matmul" in out and "No picture: " in out and "matplotlib" in out


def test_without_the_extension_nothing_is_timed_unasked(measured, monkeypatch, capsys):
    monkeypatch.setattr(cpp, "missing", "not built here")
    with pytest.raises(SystemExit):
        measured("--losses", "clip", "--sizes", "64")
    assert "not built here; or ask for it with --without-cpp" in capsys.readouterr().err
    monkeypatch.setattr(cpp, "_warned", True)
    assert measured("--losses", "clip", "--sizes", "64", "--without-cpp") == 0
