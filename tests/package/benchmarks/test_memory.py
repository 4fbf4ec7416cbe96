"""Peak memory: the allocator's events against the resident memory, and the largest batch against measured ones."""

import json
import os
import pathlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import cases, measure, report, run
from tests.support.benchmarks import CPU, row
from tests.support.testing import ROOT

RESIDENT = """
import json, sys, torch
from benchmarks.cases import Case
from benchmarks.run import make_step
from tests.support.memory_probe import peak_beyond
loss, provider, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
device = torch.device("cpu")
def step(n):
    case = Case(loss, n, 32, torch.float32)
    return make_step(provider, case, case.inputs(device), device)
step(512).run()  # thread pools, workspaces and code
large = step(n)
gradients = []
peak = peak_beyond(lambda: gradients.extend(large.run().values()))
print(json.dumps(peak - sum(gradient.nbytes for gradient in gradients)))
"""


def extra_mib(loss, provider, n, d=32):
    case = cases.Case(loss, n, d, torch.float32)
    return measure.peak_extra_mib(run.make_step(provider, case, case.inputs(CPU), CPU), CPU)


def test_peak_is_exact_and_silent(capfd):
    """Three tensors at once, one of them the gradient, whatever was allocated and freed before."""
    x = torch.randn(256, 1024, requires_grad=True)

    def forward():
        torch.empty(1024, 128)
        return (x.sin().exp()).sum()

    step = measure.Step(forward, lambda loss: dict(x=torch.autograd.grad(loss, x)[0]))
    assert measure.peak_extra_mib(step, CPU) == pytest.approx(2.0, abs=0.01)
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("provider", "sizes"), [("ours", (16384, 32768)), ("eager", (2048, 4096))])
def test_peak_is_what_the_process_takes(provider, sizes):
    """In a fresh process that gives freed blocks back at once; beside the allocator there are the threads' tiles."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    for n in sizes:
        command = [sys.executable, "-c", RESIDENT, "nt_xent", provider, str(n)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
        resident = json.loads(done.stdout) / measure.MIB
        events = extra_mib("nt_xent", provider, n)
        assert events <= resident + 0.5
        assert resident <= 1.15 * events + 4


def measured_row(loss, provider, n, d):
    return replace(row(loss, provider, n=n, d=d, mib=extra_mib(loss, provider, n, d)), dtype="float32")


@pytest.mark.parametrize(("loss", "provider"), [
    *((loss, "ours") for loss in cases.LOSSES if loss not in ("mmcl", "moco", "moco_arcl")),
    *((loss, "eager") for loss in (*cases.CORE, "vicreg")), ("clip", "linear_cross_entropy"),
])  # fmt: skip
def test_largest_batch_is_that_of_larger_measurements(loss, provider):
    """What two sizes say of the memory of larger batches is what those take."""
    dense = provider == "eager"
    d, first, second, *larger = (32, 2048, 3072, 4096, 5120) if dense else (128, 4096, 6144, 8192, 10240)
    rows = [measured_row(loss, provider, n, d) for n in (first, second)]
    for n in larger:
        takes = extra_mib(loss, provider, n, d) + report.held_mib(loss, n, d, "float32")
        assert report.largest_batch(rows, takes / 1024) == pytest.approx(n, rel=0.03)


def peaks(provider, sizes_and_mib, loss="clip"):
    return [replace(row(loss, provider, n=n, mib=mib), dtype="float32") for n, mib in sizes_and_mib]


def test_largest_batch_of_noise():
    """Peaks that fall or grow by accident never put a dense provider before one without the matrix."""
    ours = report.largest_batch(peaks("ours", [(1024, 7.3), (2048, 3.72)]), 8.0)
    eager = report.largest_batch(peaks("eager", [(1024, 33.31), (2048, 69.67)]), 8.0)
    assert eager < 27_000 < 10 * eager < ours


def test_no_figure_without_ground():
    """None where memory grows faster than the rows, or where only small sizes were measured."""
    assert report.largest_batch(peaks("ours", [(4096, 10.0), (8192, 40.0)], "mmcl"), 8.0) is None
    assert report.batch_table(peaks("ours", [(512, 4.0), (1024, 5.0), (2048, 6.0)]), 8.0) is None
    table = report.batch_table(peaks("ours", [(8192, 4.0), (4096, 2.0)]), 8.0)
    assert next(table.columns[5].cells) == "8,192"
