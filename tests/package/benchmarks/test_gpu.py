"""The GPU command on a machine without a GPU."""

import json
import stat
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import cases, gpu, report
from tests.support.benchmarks import cells, row

pytestmark = pytest.mark.usefixtures("short_queue")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("arguments", [[], ["--parts", "report"], ["--parts", "d128", "tests"]])
def test_gpu_command_without_a_gpu(arguments, tmp_path, no_gpu, capsys):
    """The report has empty measured columns, a line gives the reason, and the status is 2."""
    assert gpu.main([*arguments, "--output", str(tmp_path)]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]
    line = cells((tmp_path / "report.md").read_text(), "nt_xent", "32,768", "128")[0]
    assert line[3:] == ["", "1.35", "≤ 1.8", "", "10.5", "≥ 8", "", "", "", ""]


def test_gpu_report_of_results_from_elsewhere(tmp_path, no_gpu):
    report.write([row(ms=1.23)], tmp_path)
    assert gpu.main(["--parts", "report", "--output", str(tmp_path)]) == 0
    assert cells((tmp_path / "report.md").read_text(), "clip", "32,768", "128")[0][3] == "1.23"


@pytest.fixture
def rehearse(monkeypatch, tmp_path):
    """Return the command on the CPU at tiny sizes, with one D of each part and a made-up test run."""
    some = {
        "d128": gpu.GRIDS["d128"],
        "large": [gpu.GRIDS["large"][0], replace(gpu.GRIDS["large"][1], dims=[128])],
        "million": gpu.GRIDS["million"],
        "small": gpu.GRIDS["small"],
    }
    monkeypatch.setattr(gpu, "GRIDS", some)
    monkeypatch.setattr(gpu, "PARTS", ("check", "tests", "sanitize", *some, "launches"))
    monkeypatch.setattr(gpu, "CHECK_COMMAND", [*gpu.CHECK_COMMAND, "--loss", "moco", "alignment"])
    monkeypatch.setattr(gpu, "TEST_COMMAND", ["-c", "print('=== 3 passed ===')"])

    def command(*arguments):
        fixed = ["--device", "cpu", "--tiny", "--without", "compile", "--output", str(tmp_path)]
        return gpu.main([*fixed, *arguments])

    return command


def test_gpu_command_rehearsed(rehearse, tmp_path, capsys, monkeypatch):
    """Every part runs, the report holds the measurements, and a second call measures nothing."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert rehearse() == 0
    finished = json.loads((tmp_path / "parts.json").read_text())
    assert list(finished) == list(gpu.PARTS)
    for dtype in gpu.CHECK_DTYPES:
        assert f"{dtype}: 2 losses, " in finished["check"]["summary"]
    assert finished["tests"]["summary"] == "3 passed"
    assert "0 differ from float64; compute-sanitizer is not installed" in finished["sanitize"]["summary"]
    text = (tmp_path / "report.md").read_text()
    assert "A rehearsal" in text and "not run" not in text
    for start in (("clip", "64", "128"), ("siglip", "128", "768"), ("clip", "2,048", "512")):
        assert float(cells(text, *start)[0][3]) > 0
    assert {file.name for file in tmp_path.iterdir()} >= {
        "results.csv",
        "results.json",
        "check-float32.txt",
        "tests.txt",
    }

    rows = report.read(tmp_path)
    assert "timings" in capsys.readouterr().out
    assert rehearse() == 0
    assert report.read(tmp_path) == rows
    assert "timings" not in capsys.readouterr().out
    assert rehearse("--parts", "small") == 0
    again = report.read(tmp_path)
    assert len(again) == len(rows) and again != rows


def test_gpu_command_out_of_time(rehearse, tmp_path, capsys):
    assert rehearse("--minutes", "0") == 0
    assert "Out of time before: check, tests, sanitize, d128" in capsys.readouterr().out.replace("\n", " ")
    assert not (tmp_path / "parts.json").exists()


def test_gpu_command_out_of_time_within_a_part(rehearse, tmp_path, monkeypatch):
    """The rows of the measured case are written; the part is not finished."""
    left = iter([1.0, 0.0])
    monkeypatch.setattr(gpu.Run, "seconds_left", lambda self: next(left))
    assert rehearse("--parts", "d128") == 0
    assert {found.loss for found in report.read(tmp_path)} == {"clip"}
    assert not (tmp_path / "parts.json").exists()


def test_gpu_command_when_ours_fails(rehearse, tmp_path, monkeypatch):
    """A loss that differs from float64 is not timed, and the status says so."""
    right = cases.LOSSES["clip"]
    monkeypatch.setitem(cases.LOSSES, "clip", replace(right, ours=lambda **inputs: 1.1 * right.ours(**inputs)))
    assert rehearse("--parts", "d128") == 1
    assert "FAILED clip D = 128: differs from float64" in (tmp_path / "report.md").read_text()


def test_gpu_command_when_a_part_breaks(rehearse, tmp_path, monkeypatch):
    """The report names the failure, and the next call goes on after that part."""

    def broken(run):
        raise RuntimeError("illegal access")

    monkeypatch.setattr(gpu, "run_tests", broken)
    with pytest.raises(RuntimeError, match="illegal access"):
        rehearse("--parts", "tests", "small")
    text = (tmp_path / "report.md").read_text()
    assert "- tests: FAILED: RuntimeError: illegal access" in text
    assert "not run: check, sanitize, d128, large, million, small, launches" in text


def test_gpu_command_when_the_check_fails(rehearse, tmp_path, monkeypatch):
    """The other parts run all the same, as after a failed test."""
    monkeypatch.setattr(gpu, "CHECK_COMMAND", ["-c", "print('27 losses: 1 wrong'); raise SystemExit(1)"])
    assert rehearse("--parts", "check", "tests") == 1
    text = (tmp_path / "report.md").read_text()
    assert "- check: bfloat16: 27 losses: 1 wrong; float16: 27 losses: 1 wrong" in text
    assert "- tests: 3 passed" in text


def test_gpu_command_when_the_tests_fail(rehearse, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "TEST_COMMAND", ["-c", "print('1 failed'); raise SystemExit(1)"])
    assert rehearse("--parts", "tests") == 1
    assert "- tests: 1 failed" in (tmp_path / "report.md").read_text()


def _sanitizer(folder, text):
    program = folder / "compute-sanitizer"
    program.write_text(f"#!{sys.executable}\nimport os, sys\n{text}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_sanitizers(rehearse, tmp_path, monkeypatch):
    """Each tool runs the small shapes with uncached memory; an error of one tool fails the part."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu, "SANITIZE_SECONDS", 120.0)
    _sanitizer(
        tmp_path,
        "assert sys.argv[6:8] == ['-m', 'benchmarks.small_shapes'], sys.argv\n"
        "assert os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'] == '1'\n"
        "found = 2 if sys.argv[2] == 'racecheck' else 0\n"
        "print(f'========= ERROR SUMMARY: {found} errors')\n"
        "raise SystemExit(9 if found else 0)",
    )
    assert rehearse("--parts", "sanitize") == 9
    summary = json.loads((tmp_path / "parts.json").read_text())["sanitize"]["summary"]
    assert "memcheck: ERROR SUMMARY: 0 errors; racecheck: ERROR SUMMARY: 2 errors; initcheck: " in summary


def test_what_takes_too_long_is_stopped(tmp_path):
    """The processes that the command started are stopped too."""
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    with (tmp_path / "log").open("w") as log:
        status, last = gpu.run_logged([sys.executable, "-c", f"print('begun', flush=True); {child}"], log, 3.0)
    assert status != 0 and last == "stopped after 3 s; begun"
    assert time.monotonic() - start < 30
