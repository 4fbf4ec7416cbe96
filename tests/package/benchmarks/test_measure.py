"""The times of a GPU, with made-up measurements."""

import types
from contextlib import contextmanager

import torch

from benchmarks import measure


def test_queue_is_short_for_long_iterations(monkeypatch):
    queues = []

    def time_once(step, queue):
        queues.append((step, queue))
        return [(step, 0.0)] * queue

    monkeypatch.setattr(measure, "_time_cuda", time_once)
    monkeypatch.setattr(measure, "_WARM_UP_SECONDS", 0.0)
    spreads, errors = measure.time_interleaved(
        {"short": 1.0, "long": 900.0}, torch.device("cuda"), seconds=0, min_rounds=2
    )
    assert queues == [(1.0, 1), (900.0, 1), *[(1.0, measure._CUDA_QUEUE), (900.0, 1)] * 2]
    assert spreads["long"]["both"].ms_50 == 900
    assert not errors


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
