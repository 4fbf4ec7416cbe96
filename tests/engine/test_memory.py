"""Memory: a peak below 64 MiB where a dense matrix has 1 GiB (36 MiB on the slow backend), and O(N D) saved bytes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import contrastive_kernels as ck
from contrastive_kernels.engine.backends import BACKENDS
from tests.support.memory_probe import MEASURED, ROWS
from tests.support.testing import CASES, ROOT, backends, case_params, device_of

LIMIT = 64 * 2**20


@pytest.fixture
def saved_scores():
    """Return the function that sets the limit; it is the default again afterwards."""
    yield ck.set_saved_scores_limit
    ck.set_saved_scores_limit(None)


@pytest.fixture(scope="module")
def peaks():
    """Return a function of backend and case; one process measures all cases of a backend."""
    found = {}

    def peak(backend, name):
        if backend not in found:
            # freed blocks go back to the system at once, so that the probe measures live memory, not malloc's reserve
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
            process = subprocess.run(
                [sys.executable, "-m", "tests.support.memory_probe", backend],
                capture_output=True,
                text=True,
                cwd=ROOT,
                env=environment,
            )
            assert process.returncode == 0, process.stderr
            lines = [json.loads(line) for line in process.stdout.splitlines()]
            found[backend] = {line["case"]: line["bytes"] for line in lines}
        return found[backend][name]

    return peak


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(("backend", "name"), [(b, name) for b in backends() if b in ROWS for name in MEASURED])
def test_peak_is_bounded(backend, name, peaks):
    peak = peaks(backend, name)
    assert peak <= LIMIT, f"{peak / 2**20:.0f} MiB beyond inputs and gradients"


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_the_probe_sees_a_matrix():
    """The assertion above can fail: the probe reports a dense product of the forbidden size."""
    code = """
import torch
from tests.support.memory_probe import peak_beyond
x = torch.randn(4096, 64)
print(peak_beyond(lambda: (x @ x.T).exp().sum()))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(process.stdout) > LIMIT


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.skipif("cpp" not in backends(), reason="the other backends do not pack the columns")
def test_few_rows_take_no_copy_of_the_columns():
    """Two sweeps, and one visit of the rows: the results, and tiles that do not grow with the columns."""
    code = """
import torch
import contrastive_kernels as ck
from tests.support.memory_probe import peak_beyond
torch.set_grad_enabled(False)
x, y = torch.randn(32, 512), torch.randn(16384, 512)
for function in (lambda y: ck.similarity_logsumexp(x, y), lambda y: ck.moco_loss(x, x, y, normalize=False)):
    function(y[:1024])
    print(peak_beyond(lambda: function(y)))
"""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    packed = 4 * 16384 * 512
    assert all(int(line) < packed / 4 for line in process.stdout.split()), process.stdout


def bytes_saved(case, n, backend) -> int:
    """Return the bytes saved for the backward: each storage once, without those of the inputs."""
    features = case.features((n, n, 32), torch.float32, device_of(backend))
    leaves = {k: v.requires_grad_(k not in case.detached) for k, v in features.items()}
    inputs = {v.untyped_storage().data_ptr() for v in leaves.values()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = case(ck, leaves, backend=backend)
    assert loss.requires_grad
    return sum(saved.values())


@pytest.mark.parametrize("case", case_params(CASES))
def test_saved_bytes_are_linear_in_the_rows(case, backend, saved_scores):
    """A few copies of the features (normalised, concatenated) and vectors; twice the rows, twice the bytes."""
    saved_scores(0)
    small, large = (bytes_saved(case, n, backend) for n in (256, 512))
    assert large <= 2.1 * small
    features = sum(4 * v.numel() for v in case.features((512, 512, 32)).values())
    assert large <= 5 * features


def test_scores_are_saved_up_to_a_limit(backend, saved_scores):
    """Only few are saved by default, and never more than the limit allows."""
    assert BACKENDS[backend].saved_scores_bytes <= 4 * 2**20
    saved_scores(4 * 256 * 256)
    at_the_limit, beyond = (bytes_saved(CASES["clip"], n, backend) for n in (256, 257))
    features = torch.empty(1, 1, device=device_of(backend))
    if BACKENDS[backend].score_dtype(features, features):
        assert at_the_limit >= 4 * 256 * 256
    assert beyond < 2 * 4 * 257 * 32 * 2
