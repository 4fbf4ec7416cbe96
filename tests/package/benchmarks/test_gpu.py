"""The GPU command on a machine without a GPU."""

import json
import os
import stat
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases, gpu, report
from contrastive_kernels.engine.backends.triton import comparison, first_use
from tests.support.benchmarks import cells, row

pytestmark = pytest.mark.usefixtures("short_queue")
GRIDS = gpu.GRIDS


def _measured(folder: Path) -> str:
    """Return the report without its predictions."""
    text = (folder / "report.md").read_text()
    return text[text.index("### Aims") :]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("arguments", [[], ["--parts", "report"], ["--parts", "d128", "tests"]])
def test_gpu_command_without_a_gpu(arguments, tmp_path, no_gpu, capsys):
    """The report has empty measured columns, a line gives the reason, and the status is 2."""
    assert gpu.main([*arguments, "--output", str(tmp_path)]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]
    line = cells(_measured(tmp_path), "nt_xent", "32,768", "128")[0]
    assert [cell for cell in line[3:] if cell[:1] in ("", "≤", "≥")] == ["", "≤ 1.2", "", "≥ 8", "", "", "", ""]
    assert float(line[4]) > 0 and float(line[7]) > 0  # predictions


def test_gpu_report_of_results_from_elsewhere(tmp_path, no_gpu):
    report.write([row(ms=1.23)], tmp_path)
    assert gpu.main(["--parts", "report", "--output", str(tmp_path)]) == 0
    assert cells(_measured(tmp_path), "clip", "32,768", "128")[0][3] == "1.23"


@pytest.fixture
def rehearse(monkeypatch, tmp_path):
    """Return the command on the CPU at tiny sizes, with one D of each part and a made-up test run."""
    some = {
        "d128": gpu.GRIDS["d128"],
        "large": [gpu.GRIDS["large"][0], replace(gpu.GRIDS["large"][1], dims=[128])],
        "million": gpu.GRIDS["million"],
        "queue": gpu.GRIDS["queue"],
        "small": gpu.GRIDS["small"],
    }
    monkeypatch.setattr(gpu, "GRIDS", some)
    monkeypatch.setattr(gpu, "PARTS", (*(part for part in gpu.PARTS if part not in GRIDS or part in some),))
    monkeypatch.setattr(gpu, "start", lambda part, run, seconds: gpu.work(part, run))
    monkeypatch.setattr(gpu.smoke, "CALLS", ("columns", "small"))
    monkeypatch.setattr(gpu.smoke, "DTYPES", {"float16": torch.float16})
    monkeypatch.setattr(gpu, "COMPILE", "print('compiled')")
    monkeypatch.setattr(gpu, "CHECK_COMMAND", [*gpu.CHECK_COMMAND, "--loss", "moco", "alignment"])
    monkeypatch.setattr(gpu, "TEST_COMMAND", ["-c", "print('=== 3 passed ===')"])

    def command(*arguments):
        fixed = ["--device", "cpu", "--tiny", "--without", "compile", "--output", str(tmp_path)]
        return gpu.main([*fixed, *arguments])

    return command


def test_gpu_command_rehearsed(rehearse, tmp_path, capsys, monkeypatch):
    """Every part runs, the report holds the measurements, and a second call measures nothing."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(gpu, "_newest_ptxas", lambda: None)
    assert rehearse("--minutes", "60") == 0
    finished = json.loads((tmp_path / "parts.json").read_text())
    assert list(finished) == list(gpu.PARTS)
    for dtype in gpu.CHECK_DTYPES:
        assert f"{dtype}: 2 losses, " in finished["check"]["summary"]
    assert finished["tests"]["summary"] == "3 passed"
    assert finished["tests-ptxas"]["summary"].startswith("no ptxas newer")
    assert finished["smoke"]["summary"] == "2 of 2 kinds of call right"
    assert finished["compile"]["summary"] == "6 of 6 cases compiled"
    assert "0 differ from float64; compute-sanitizer is not installed" in finished["sanitize"]["summary"]
    text = (tmp_path / "report.md").read_text()
    assert "A rehearsal" in text and "not run" not in text
    measured = (("clip", "64", "128"), ("siglip", "128", "768"), ("clip", "2,048", "512"), ("moco", "64", "128"))
    for start in measured:
        assert float(cells(_measured(tmp_path), *start)[0][3].replace(",", "")) > 0
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


@pytest.mark.parametrize(
    ("ours", "others", "expected"),
    [
        ({256: 3.0, 512: 3.0, 1024: 3.0}, {256: 1.0, 512: 2.0, 1024: 4.0}, "crossover at 1,048,576 pairs"),
        ({256: 3.0, 512: 3.0}, {256: 4.0, 512: 2.0}, "crossover above 262,144 pairs"),
        ({256: 3.0, 512: 3.0}, {256: 4.0, 512: 4.0}, "crossover below the smallest batch: leave it out"),
        ({256: 3.0}, {}, "no crossover measured"),
    ],
)
def test_gpu_crossover(ours, others, expected):
    """From there on the kernels are never slower than PyTorch, in any loss."""
    rows = [row(n=n, ms=ms, provider=name) for name, of in {"ours": ours, "ours-torch": others}.items()
            for n, ms in of.items()]  # fmt: skip
    fast = [row("nt_xent", n=n, ms=0.1, provider="ours") for n in ours]
    fast += [row("nt_xent", n=n, ms=1.0, provider="ours-torch") for n in others]
    assert gpu.crossover([*rows, *fast, row(n=256, note="out of memory")]) == expected


def test_gpu_command_out_of_time(rehearse, tmp_path, capsys):
    assert rehearse("--minutes", "0") == 0
    assert "Out of time for: smoke, check, tests, compile, d128" in capsys.readouterr().out.replace("\n", " ")
    assert not (tmp_path / "parts.json").exists()


def test_gpu_command_out_of_time_within_a_part(rehearse, tmp_path, monkeypatch):
    """The rows of the measured case are written; the part is not finished."""
    monkeypatch.setattr(gpu, "PARTS", ("d128",))
    left = iter([100.0, 100.0, 0.0])
    with monkeypatch.context() as patch:
        patch.setattr(gpu.Run, "seconds_left", lambda self: next(left))
        assert rehearse() == 0
    first = report.read(tmp_path)
    assert {found.loss for found in first} == {"clip"}
    assert not (tmp_path / "parts.json").exists()
    # the same command goes on with the other cases and keeps the first
    assert rehearse() == 0
    both = report.read(tmp_path)
    assert [row for row in both if row.loss == "clip"] == first
    assert {found.loss for found in both} == {"clip", "nt_xent", "info_nce"}
    summary = json.loads((tmp_path / "parts.json").read_text())["d128"]["summary"]
    assert summary == f"{sum(row.mode == 'both' and not row.note for row in both)} timings"


def test_gpu_command_fills_its_time(rehearse, tmp_path, monkeypatch):
    """A part that no longer fits waits for the next call, and those that fit run."""
    begun = []
    monkeypatch.setattr(gpu, "start", lambda part, run, seconds: begun.append((part, seconds)) or 0)
    monkeypatch.setattr(gpu.Run, "seconds_left", lambda self: 300.0 - 100 * len(begun))
    assert rehearse() == 0
    assert begun == [("smoke", 120), ("compile", 120), ("d128", 100)]


def test_gpu_command_when_ours_fails(rehearse, tmp_path, monkeypatch):
    """A loss that differs from float64 is not timed, and the status says so."""
    right = cases.LOSSES["clip"]
    monkeypatch.setitem(cases.LOSSES, "clip", replace(right, ours=lambda **inputs: 1.1 * right.ours(**inputs)))
    assert rehearse("--parts", "d128") == 1
    assert "FAILED clip D = 128: differs from float64" in (tmp_path / "report.md").read_text()


def test_gpu_command_when_a_part_breaks(rehearse, tmp_path, monkeypatch):
    """The report names the failure, and the other parts run."""

    def broken(run):
        raise RuntimeError("illegal access")

    monkeypatch.setattr(gpu, "run_tests", broken)
    assert rehearse("--parts", "tests", "small") == 1
    text = (tmp_path / "report.md").read_text()
    assert "- tests: FAILED: RuntimeError: illegal access" in text
    assert "- small: " in text
    assert "not run: smoke, check, compile, d128, large, million, queue, tests-ptxas, launches, sanitize" in text


@pytest.mark.parametrize(
    ("worker", "text"),
    [
        ("import time; print('begun', flush=True); time.sleep(60)", "FAILED: stopped after 4 s; begun"),
        ("import os; print('begun', flush=True); os.abort()", "FAILED: begun"),
    ],
    ids=["hangs", "crashes"],
)
def test_gpu_command_when_a_process_is_lost(worker, text, tmp_path, monkeypatch):
    """What hangs is stopped after its limit; either way the next part begins, and a later call goes on after both."""
    monkeypatch.setattr(gpu, "PARTS", ("check", "tests"))
    monkeypatch.setattr(gpu, "LIMITS", {"check": 4, "tests": 4})
    monkeypatch.setattr(gpu, "WORKER", ["-c", worker])
    command = ["--device", "cpu", "--tiny", "--output", str(tmp_path)]
    assert gpu.main(command) > 0
    report_text = (tmp_path / "report.md").read_text()
    assert f"- check: {text}" in report_text and f"- tests: {text}" in report_text
    assert gpu.main(command) == 0


def test_gpu_command_cut_by_the_end_of_the_call(tmp_path, monkeypatch):
    """A part that was stopped for that goes on in the next call."""
    monkeypatch.setattr(gpu, "PARTS", ("d128",))
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 1)
    monkeypatch.setattr(gpu, "WORKER", ["-c", "import time; time.sleep(60)"])
    assert gpu.main(["--device", "cpu", "--tiny", "--output", str(tmp_path), "--minutes", "0.05"]) == 0
    assert not (tmp_path / "parts.json").exists()


def test_a_part_in_a_process_of_its_own(tmp_path):
    """The worker gets the settings, and its end is in the report."""
    command = ["--device", "cpu", "--tiny", "--output", str(tmp_path), "--parts", "launches"]
    assert gpu.main(command) == 0
    assert "- launches: kernels are counted on a GPU" in (tmp_path / "report.md").read_text()


def test_benchmarks_see_a_wrong_kernel(tmp_path, monkeypatch):
    """PyTorch does not stand in for it, which would be timed as ours."""
    monkeypatch.delenv(first_use.ENVIRONMENT_VARIABLE, raising=False)
    program = "import benchmarks; from contrastive_kernels.engine.backends.triton import first_use as f; "
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-c", program + "print(f.switched_off())"]
        assert gpu.run_logged(command, log, 60.0) == (0, "True")


def test_smoke_names_what_is_wrong(rehearse, tmp_path, monkeypatch, capsys):
    """One screen: a table of calls and dtypes, and below it what is wrong; a hanging one takes no other with it."""
    lines = {"columns": "print('WRONG forward, D = 64: row_lse'); sys.exit(1)", "small": "print('right (10)')"}
    command = gpu.run_logged

    def stub(arguments, log, seconds, **options):
        return command([sys.executable, "-c", f"import sys; {lines[arguments[4]]}"], log, seconds, **options)

    monkeypatch.setattr(gpu, "run_logged", stub)
    assert rehearse("--parts", "smoke") == 1
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()[1:4]] == [
        ["float16"], ["columns", "WRONG"], ["small", "right", "(10)"]
    ]  # fmt: skip
    summary = json.loads((tmp_path / "parts.json").read_text())["smoke"]["summary"]
    assert summary == "1 of 2 kinds of call right; columns in float16: WRONG forward, D = 64: row_lse"


def test_smoke_finds_a_wrong_kernel(monkeypatch, capsys):
    """Of any operator."""
    right = comparison.PLAIN["views"]
    monkeypatch.setattr(comparison, "PLAIN", {**comparison.PLAIN, "views": right})
    assert gpu.smoke.main(["--call", "small", "--dtype", "float32", "--device", "cpu"]) == 0
    assert "right (10)" in capsys.readouterr().out
    calls = iter(range(1000))

    def wrong(views):
        # the kernel is called first, then PyTorch twice
        return right(views) if next(calls) % 3 else right(views).flip(0)

    monkeypatch.setattr(comparison, "PLAIN", {**comparison.PLAIN, "views": wrong})
    assert gpu.smoke.main(["--call", "small", "--dtype", "float32", "--device", "cpu"]) == 1
    assert "WRONG views, D = 64: least similarity differs" in capsys.readouterr().out


def test_a_case_is_compiled_ahead(monkeypatch):
    """By one step of ours on a few rows, a multiple of 16."""
    steps = []
    monkeypatch.setattr(gpu, "gradients", lambda loss, inputs: steps.append((loss.shape, len(inputs))))
    gpu.compile_case("clip", "64", "16", "bfloat16", "cpu")
    assert steps and steps[0][0] == ()
    assert gpu.COMPILED_ROWS % 16 == 0


def test_newer_ptxas(rehearse, tmp_path, monkeypatch):
    """The tests run once more with it, if it is newer than Triton's."""
    assembler = tmp_path / "ptxas"
    assembler.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.4, V13.4.31'\n")
    assembler.chmod(0o755)
    assert gpu.ptxas_version(str(assembler)) == (13, 4, 31)
    assert gpu.ptxas_version(str(tmp_path / "none")) is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu._newest_ptxas() == ((13, 4, 31), str(assembler))
    monkeypatch.setattr(
        gpu, "TEST_COMMAND", ["-c", "import os; print(os.environ['TRITON_PTXAS_PATH'], os.environ['PTXAS_OPTIONS'])"]
    )
    monkeypatch.setattr(gpu, "_bundled_ptxas", lambda: (12, 8, 93))
    assert rehearse("--parts", "tests-ptxas") == 0
    summary = json.loads((tmp_path / "parts.json").read_text())["tests-ptxas"]["summary"]
    assert summary == f"ptxas 13.4.31, Triton's is 12.8.93: {assembler} --regAllocOptLevel=2"
    monkeypatch.setattr(gpu, "_bundled_ptxas", lambda: (13, 4, 31))
    assert rehearse("--parts", "tests-ptxas") == 0
    assert "no ptxas newer" in (tmp_path / "parts.json").read_text()


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_bundled_ptxas_is_the_one_of_the_device(capability, monkeypatch):
    """Triton has two: which one it takes for a GPU differs between its versions."""
    compiler = pytest.importorskip("triton.backends.nvidia.compiler", exc_type=ImportError)
    paths = {80: "old", 90: "of 90", 100: "of 100"}
    monkeypatch.setattr(compiler, "get_ptxas", lambda architecture: SimpleNamespace(path=paths[architecture]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(gpu, "ptxas_version", lambda path: path)
    assert gpu._bundled_ptxas() == paths[10 * capability[0]]


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


def test_what_a_stopped_part_has_started_is_stopped_too(tmp_path):
    """A kernel that hangs holds the GPU until its process ends."""
    sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    worker = (
        "import signal, sys; from benchmarks import gpu; signal.signal(signal.SIGTERM, gpu._stop_commands); "
        f"gpu.run_logged([sys.executable, '-c', {sleeper!r}], sys.stderr, 60.0)"
    )
    with (tmp_path / "log").open("w") as log:
        status, last = gpu.run_logged([sys.executable, "-c", worker], log, 10.0)
    assert status != 0 and last.startswith("stopped after 10 s; ")
    process = Path("/proc") / last.split()[-1]
    assert not process.exists() or "State:\tZ" in (process / "status").read_text()


def test_what_takes_too_long_is_stopped(tmp_path):
    """The processes that the command started are stopped too."""
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    with (tmp_path / "log").open("w") as log:
        status, last = gpu.run_logged([sys.executable, "-c", f"print('begun', flush=True); {child}"], log, 3.0)
    assert status != 0 and last == "stopped after 3 s; begun"
    assert time.monotonic() - start < 30
