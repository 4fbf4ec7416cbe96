"""The benchmark: its eager forms, its checks, its reports, and the GPU command on a machine without a GPU."""

import importlib.machinery
import json
import pathlib
import stat
import sys
import time
import types
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

for package in ("matplotlib", "rich"):
    pytest.importorskip(package)

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import contrastive_kernels as ck  # noqa: E402, after the check for its packages
from benchmarks import aims, cases, eager, gpu, measure, peers, report, run, small_shapes  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_queue(monkeypatch):
    """Give MoCo a short queue, and forget the checks of other tests."""
    monkeypatch.setattr(cases, "QUEUE", 512)
    cases.objections.cache_clear()
    yield
    cases.objections.cache_clear()


# Losses


def test_every_loss_is_measured():
    """The keys are the names of the losses; ours and the eager form are the functions of that name."""
    functions = {name.removesuffix("_loss"): getattr(ck, name) for name in ck.__all__ if name.endswith("_loss")}
    functions |= {"distance_polarization": ck.distance_polarization, "lmcl": ck.nt_xent_loss}
    assert set(cases.LOSSES) == set(functions)
    for name, loss in cases.LOSSES.items():
        ours = loss.ours
        while isinstance(ours, partial):
            ours = ours.func
        assert ours is functions[name]
        assert loss.eager is getattr(eager, name)


def test_lmcl_is_its_module():
    case = cases.Case("lmcl", 64, 8, torch.float64)
    band = {name: getattr(cases.BAND, name) for name in ("lower", "upper", "weight")}
    module = ck.LMCLLoss("nt_xent", temperature=cases.TEMPERATURE, **band)
    inputs = case.inputs(CPU)
    assert module(*inputs.values()).item() == cases.LOSSES["lmcl"].ours(**inputs).item()


@pytest.mark.parametrize("loss", cases.LOSSES)
def test_ours_is_the_eager_form(loss):
    cases.check("ours", cases.Case(loss, 192, 64, torch.float64), CPU)


@pytest.mark.parametrize("loss", cases.LOSSES)
def test_check_notices(loss, monkeypatch):
    """The check rejects a value off by a percent with right gradients, and wrong gradients with the right value."""
    right = cases.LOSSES[loss]
    case = cases.Case(loss, 256, 64, torch.float32)

    def wrong_value(**inputs):
        value = right.ours(**inputs)
        return value + 0.01 * value.detach().abs()

    def wrong_gradient(**inputs):
        value = right.ours(**inputs)
        return 1.01 * value - 0.01 * value.detach()

    for wrong, what in ((wrong_value, "value"), (wrong_gradient, "gradient")):
        monkeypatch.setitem(cases.LOSSES, loss, replace(right, ours=wrong))
        cases.objections.cache_clear()
        with pytest.raises(cases.Unavailable, match=f"differs from float64: {what}"):
            cases.check("ours", case, CPU)


def test_dense_forms_are_bounded():
    """An eager form whose estimate exceeds the limit is left out; that of MMCL counts N matrices."""
    settings = run.Settings(CPU, 0.0, 1, memory_limit_gib=0.01)
    for loss, n in (("clip", 2048), ("mmcl", 128)):
        rows = run.measure_case(cases.Case(loss, n, 8, torch.float32), ["eager"], settings, run.environment(CPU), print)
        assert [row.ms_50 for row in rows] == [None]
        assert "needs about" in rows[0].note


def test_a_provider_that_raises_is_noted(monkeypatch):
    def broken(**inputs):
        raise AssertionError("no such device\nand more")

    monkeypatch.setitem(cases.LOSSES, "clip", replace(cases.LOSSES["clip"], ours=broken))
    settings = run.Settings(CPU, 0.0, 1, 1.0)
    rows = run.measure_case(
        cases.Case("clip", 64, 8, torch.float32), ["ours", "eager"], settings, run.environment(CPU), print
    )
    assert [row.note for row in rows if row.provider == "ours"] == ["AssertionError: no such device"]
    assert [row.mode for row in rows if row.provider == "eager"] == ["fwd", "bwd", "both"]


# Providers


def test_workspace_limit_holds_in_both_halves(monkeypatch):
    """The limit holds in forward and backward, and is reset after them."""
    limits, seen = [None], []
    monkeypatch.setattr(ck, "set_workspace_limit", limits.append, raising=False)

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(("forward", limits[-1]))
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            seen.append(("backward", limits[-1]))
            return grad.expand(64, 8)

    def ours(image_features, text_features, logit_scale):
        return Spy.apply(image_features) + text_features.sum() * logit_scale

    monkeypatch.setitem(cases.LOSSES, "clip", replace(cases.LOSSES["clip"], ours=ours))
    case = cases.Case("clip", 64, 8, torch.float32)
    for provider, limit in (("ours-128MB", 128 * 10**6), ("ours", None)):
        seen.clear()
        run.make_step(provider, case, case.inputs(CPU), CPU).run()
        assert seen == [("forward", limit), ("backward", limit)]
        assert limits[-1] is None


def test_saved_scores_are_those_of_one_provider():
    """This provider saves scores without limit, others by the default."""
    case, saved = cases.Case("clip", 64, 8, torch.float32), {}
    for provider in ("ours", "ours-saved"):
        sizes = []
        with (
            cases.memory_of(provider),
            torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: to.append(x.numel()), lambda x: x),
        ):
            assert ck.saved_scores_limit() == (2**62 if provider == "ours-saved" else None)
            cases.provider_function(provider, case, CPU)(**case.inputs(CPU))
        saved[provider] = sizes
    assert ck.saved_scores_limit() is None
    assert max(saved["ours-saved"]) == 64 * 64


def test_graph_takes_the_inputs_in_order(monkeypatch):
    """The capture is replaced by one that replays the function itself."""
    captured = []

    def capture(function, sample):
        captured.append(sample)
        return function

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    case = cases.Case("siglip", 64, 8, torch.float64)
    monkeypatch.setattr(cases.Case, "inputs", lambda self, device, inputs=cases.Case.inputs: inputs(self, CPU))
    replay = cases.provider_function("graph", case, torch.device("cuda"))
    inputs = case.inputs(CPU)
    assert replay(**inputs).item() == cases.LOSSES["siglip"].ours(**inputs).item()
    assert [value.shape for value in captured[0]] == [value.shape for value in inputs.values()]


def test_graph_needs_a_gpu():
    with pytest.raises(cases.Unavailable, match="CUDA device"):
        cases.provider_function("graph", cases.Case("clip", 64, 8, torch.float32), CPU)


# Peers: a stand-in for each package is a dense loss with the documented signature.


def _rows_mean(query, key, target):
    return F.cross_entropy(query @ key.T, target)


def _flash_loss(q, k, labels=None, scale=None, head_dim=256):
    assert q.shape[1] % head_dim == 0
    q = q if scale is None else q * scale
    return F.cross_entropy(q @ k.T, torch.arange(len(q)), reduction="none")


class _LigerLoss:
    def __init__(self, accum_dtype=None):
        assert accum_dtype == torch.float32

    def __call__(self, lin_weight, _input, target):
        return _rows_mean(_input, lin_weight, target)


def _cut_loss(e, c, targets, *, filter_eps="auto"):
    assert filter_eps is None
    return _rows_mean(e, c, targets)


class _MemeffLoss:
    def __init__(self, temperature=0.07, normalized_inputs=False, stable=True):
        assert normalized_inputs and not stable
        self.temperature = temperature

    def __call__(self, image, text):
        target = torch.arange(len(image))
        logits = image @ text.T / self.temperature
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _siglip_loss(img, txt, log_temperature, bias):
    sign = 2 * torch.eye(len(img), dtype=img.dtype) - 1
    return -F.logsigmoid(sign * (log_temperature.exp() * img @ txt.T + bias)).sum() / len(img)


STAND_INS = {
    "inf-cl": ("inf_cl", {"cal_flash_loss": _flash_loss}),
    "liger": ("liger_kernel.transformers", {"LigerFusedLinearCrossEntropyLoss": _LigerLoss}),
    "cce": ("cut_cross_entropy", {"linear_cross_entropy": _cut_loss}),
    "quack": ("quack.linear_cross_entropy", {"chunked_linear_cross_entropy": _rows_mean}),
    "memeff": ("memeff", {"MemoryEfficientCLIPLoss": _MemeffLoss}),
    "siglip-kernel": ("siglip_kernel", {"fused_siglip_loss": _siglip_loss}),
}
PEER_LOSSES = [(name, loss) for name, peer in peers.PEERS.items() for loss in peer.losses]


def _install(monkeypatch, name, **contents):
    path, own = STAND_INS[name]
    for depth in range(1, path.count(".") + 2):
        module = types.ModuleType(".".join(path.split(".")[:depth]))
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__dict__.update(own | contents)


@pytest.mark.parametrize(("name", "loss"), PEER_LOSSES)
@pytest.mark.parametrize("d", [128, 72, 768])
def test_peer_adapter(name, loss, d, monkeypatch):
    _install(monkeypatch, name)
    assert name in peers.importable()
    cases.check(name, cases.Case(loss, 192, d, torch.float64), CPU)


def test_peer_that_is_wrong(monkeypatch):
    _install(monkeypatch, "inf-cl", cal_flash_loss=lambda *arguments, **options: 2 * _flash_loss(*arguments, **options))
    with pytest.raises(cases.Unavailable, match="differs from float64"):
        cases.check("inf-cl", cases.Case("clip", 192, 128, torch.float32), CPU)


def test_peer_that_is_absent():
    assert "inf-cl" not in peers.importable()
    with pytest.raises(cases.Unavailable, match="inf_cl is not installed"):
        cases.check("inf-cl", cases.Case("clip", 192, 128, torch.float32), CPU)


def test_peer_without_this_loss(monkeypatch):
    _install(monkeypatch, "siglip-kernel")
    with pytest.raises(cases.Unavailable, match="does not compute"):
        cases.check("siglip-kernel", cases.Case("clip", 192, 128, torch.float32), CPU)


# The times of a GPU, with made-up measurements


def test_queue_is_short_for_long_iterations(monkeypatch):
    queues = []

    def time_once(step, queue):
        queues.append((step, queue))
        return [(step, 0.0)] * queue

    monkeypatch.setattr(measure, "_time_cuda", time_once)
    monkeypatch.setattr(measure, "_WARM_UP_SECONDS", 0.0)
    spreads = measure.time_interleaved({"short": 1.0, "long": 900.0}, torch.device("cuda"), seconds=0, min_rounds=2)
    assert queues == [(1.0, 1), (900.0, 1), *[(1.0, measure._CUDA_QUEUE), (900.0, 1)] * 2]
    assert spreads["long"]["both"].ms_50 == 900


def test_kernels_are_what_runs_on_the_device(monkeypatch):
    kinds = torch.autograd.DeviceType
    events = [("kernel", kinds.CUDA), ("Memcpy DtoD", kinds.CUDA), ("Memset", kinds.CUDA), ("aten::mm", kinds.CPU)]
    profile = types.SimpleNamespace(events=lambda: [
        types.SimpleNamespace(name=name, device_type=kind) for name, kind in [*events, ("other_kernel", kinds.CUDA)]
    ])  # fmt: skip

    @contextmanager
    def profiling(activities):
        yield profile

    monkeypatch.setattr(torch.profiler, "profile", profiling)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert measure.kernel_launches(measure.Step(lambda: None, lambda loss: {})) == 2


# Rows and the report


def row(loss="clip", provider="ours", mode="both", n=32768, d=128, ms=2.0, mib=100.0, device="GPU A", note="", **more):
    timed = None if note else ms
    return run.Row(
        loss=loss, provider=provider, mode=mode, n=n, m=n, d=d, dtype="bfloat16", device=device, threads=1,
        ms_50=timed, ms_20=timed, ms_80=timed, peak_mib=None if note else mib, tflops=1.0, matmul_fraction=0.5,
        torch="2", triton="3", commit="c", date="2026-01-01", note=note, **more,
    )  # fmt: skip


def test_merge_replaces_the_provider_of_a_case_on_its_device():
    old = [row(mode=mode) for mode in measure.MODES] + [row(provider="eager"), row(device="GPU B"), row(d=256)]
    merged = report.merge(old, [row(note="out of memory")])
    assert merged == [*old[3:], row(note="out of memory")]


def test_results_without_kernel_counts_are_read(tmp_path):
    """Files of an earlier version have no such column."""
    report.write([row()], tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())
    del rows[0]["launches"]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    assert report.read(tmp_path) == [row()]


def cells(text, *start):
    """Return the table rows of a report that begin with these cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [cells for cells in rows if cells[: len(start)] == list(start)]


def same(n):
    return n


# The aims of clip at N = 32,768, D = 128: met exactly, missed in time, missed in gain, without a time of eager.
@pytest.mark.parametrize(
    ("ms", "eager", "met"), [(3.0, 15.0, "yes"), (3.1, 90.0, "no"), (2.9, 14.0, "no"), (2.9, None, "no")]
)
def test_report_says_whether_an_aim_is_met(ms, eager, met):
    rows = [row(ms=ms)] + ([row(provider="eager", ms=eager)] if eager else [])
    line = cells(aims.markdown(rows, {}, same, []), "clip", "32,768", "128")[0]
    assert line[3] == f"{ms:.3g}" and line[4] == "2.67" and line[11] == met
    assert line[6] == (f"{eager / ms:.1f}" if eager else "")


@pytest.mark.parametrize(("mib", "met"), [(244, "yes"), (245, "no")])
def test_report_holds_memory_to_megabytes(mib, met):
    """256 MB are 244.1 MiB."""
    line = cells(aims.markdown([row(n=65536, mib=mib)], {}, same, []), "clip", "65,536", "128")[0]
    assert line[11] == met


def test_report_of_limited_memory():
    rows = [row(n=65536, ms=10.0), row(n=65536, ms=11.0, provider="ours-128MB")]
    rows += [row(n=65536, d=256), row(n=65536, d=256, provider="ours-128MB", note="not available: no such function")]
    text = aims.markdown(rows, {}, same, [])
    section = text[text.index("### Scratch") : text.index("### Beside")]
    assert cells(section, "clip", "65,536", "128")[0][3:7] == ["10", "11", "10%", "≤ 15%"]
    assert cells(section, "clip", "65,536", "256")[0][4] == "not available"


def test_report_shows_every_provider_and_device():
    rows = [row(), row(provider="memeff", ms=5.0), row(device="GPU B", ms=4.0), row(n=256, ms=0.1, launches=17)]
    text = aims.markdown(rows, {"tests": {"summary": "3 passed", "status": 0}}, same, ["small"])
    first, second = text[text.index("## GPU A") : text.index("## GPU B")], text[text.index("## GPU B") :]
    assert cells(first, "clip", "32,768", "128", "memeff")[0][4:8] == ["5", "5–5", "", "2.5"]
    assert not cells(second, "clip", "32,768", "128", "memeff")
    assert cells(second, "clip", "32,768", "128", "ours")[0][4] == "4"
    assert cells(first, "clip", "256", "128")[0][3:5] == ["0.1", "17"]
    assert "- tests: 3 passed\n- not run: small\n" in text


def test_model_grows_with_the_pairs():
    assert aims.modelled_ms("clip", "ours", 65536, 512) == 30.1
    assert aims.modelled_ms("clip", "ours", 2**20, 512) == pytest.approx(256 * 30.1)
    assert aims.modelled_ms("siglip", "ours", 65536, 768) is None


def test_committed_report_is_that_of_its_folder():
    folder = ROOT / "benchmarks" / "results" / "gpu"
    finished = gpu._read_finished(folder)
    unfinished = [part for part in gpu.PARTS if part not in finished]
    text = aims.markdown(report.read(folder), finished, same, unfinished)
    assert (folder / "report.md").read_text() == text


# The command


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
    monkeypatch.setattr(gpu, "PARTS", ("tests", "sanitize", *some, "launches"))
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
    assert finished["tests"]["summary"] == "3 passed"
    assert "0 differ from float64; compute-sanitizer is not installed" in finished["sanitize"]["summary"]
    text = (tmp_path / "report.md").read_text()
    assert "A rehearsal" in text and "not run" not in text
    for start in (("clip", "64", "128"), ("siglip", "128", "768"), ("clip", "2,048", "512")):
        assert float(cells(text, *start)[0][3]) > 0
    assert {file.name for file in tmp_path.iterdir()} >= {"results.csv", "results.json", "tests.txt", "sanitize.txt"}

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
    assert "Out of time before: tests, sanitize, d128" in capsys.readouterr().out.replace("\n", " ")
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
    assert "not run: sanitize, d128, large, million, small, launches" in text


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


def test_small_shapes_notice_a_wrong_kernel(monkeypatch, capsys):
    right = cases.LOSSES["clip"]
    monkeypatch.setitem(cases.LOSSES, "clip", replace(right, ours=lambda **inputs: 1.1 * right.ours(**inputs)))
    monkeypatch.setattr(small_shapes, "SHAPES", [(24, torch.float32, ("clip", "nt_xent"))])
    assert small_shapes.main(["--device", "cpu", "--check"]) == 1
    assert "2 cases ran, 1 differ from float64" in capsys.readouterr().out
    assert small_shapes.main(["--device", "cpu"]) == 0
