"""Memory: a peak below 64 MB where one dense matrix has 1 GB (slow ones: 64 MB), and O(N D) saved for the backward."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from memory_probe import MEASURED, ROWS
from testing import CASES, backends, case_params, device_of

import contrastive_kernels as ck
from contrastive_kernels.backends import BACKENDS

LIMIT = 64 * 2**20


@pytest.fixture
def saved_scores():
    """Sets the limit for one test."""
    yield ck.set_saved_scores_limit
    ck.set_saved_scores_limit(None)


@pytest.fixture(scope="module")
def peaks():
    """Peak bytes of every case, by backend, each backend measured once in a process of its own."""
    found = {}

    def peak(backend, name):
        if backend not in found:
            probe = pathlib.Path(__file__).with_name("memory_probe.py")
            # freed blocks go back to the system at once: what is measured is what is alive, not what malloc keeps
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
            process = subprocess.run(
                [sys.executable, str(probe), backend], capture_output=True, text=True, check=False, env=environment
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
    """What is asserted above can fail: a dense product of the size forbidden is measured as such."""
    code = (
        "import torch, memory_probe as p;x = torch.randn(4096, 64);print(p.peak_beyond(lambda: (x @ x.T).exp().sum()))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=pathlib.Path(__file__).parent
    )
    assert int(process.stdout) > LIMIT


def bytes_saved(case, n, backend) -> int:
    """Bytes kept for the backward, each storage once, the inputs' own not counted."""
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
    """Few of them unasked, and never more than what was allowed."""
    assert BACKENDS[backend].SAVED_SCORES_BYTES <= 4 * 2**20
    saved_scores(4 * 256 * 256)
    at_the_limit, beyond = (bytes_saved(CASES["clip"], n, backend) for n in (256, 257))
    features = torch.empty(1, 1, device=device_of(backend))
    if BACKENDS[backend].score_dtype(features, features):
        assert at_the_limit >= 4 * 256 * 256
    assert beyond < 2 * 4 * 257 * 32 * 2
