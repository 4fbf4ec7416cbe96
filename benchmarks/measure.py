"""Times, peak memory and the matmul yardstick, on CPU and CUDA."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

MIB = 2**20
MODES = ("fwd", "bwd", "both")

# CUDA launches are asynchronous: short iterations are queued together, or the time would be that of the host.
_CUDA_QUEUE, _SHORT_MS = 5, 50.0
# A GPU starts at clocks that it cannot sustain.
_WARM_UP_SECONDS = 0.3
# Most elements of a product of the yardstick; a taller one has the same rate.
_YARDSTICK_PAIRS = 2**26


class Step(NamedTuple):
    """One iteration in two halves; ``backward`` takes the result of ``forward``."""

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], Mapping[str, Tensor]]

    def run(self) -> Mapping[str, Tensor]:
        """Run both halves and return the gradients."""
        return self.backward(self.forward())


class Spread(NamedTuple):
    """Median, 20 % and 80 % quantiles, in milliseconds."""

    ms_50: float
    ms_20: float
    ms_80: float


def _time_cpu(step: Step, _queue: int) -> list[tuple[float, float]]:
    start = time.perf_counter()
    result = step.forward()
    middle = time.perf_counter()
    step.backward(result)
    end = time.perf_counter()
    return [((middle - start) * 1e3, (end - middle) * 1e3)]


def _time_cuda(step: Step, queue: int) -> list[tuple[float, float]]:
    events = []
    for _ in range(queue):
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        start.record()
        result = step.forward()
        middle.record()
        step.backward(result)
        end.record()
        events.append((start, middle, end))
    torch.cuda.synchronize()
    return [(start.elapsed_time(middle), middle.elapsed_time(end)) for start, middle, end in events]


def time_once(step: Step, device: torch.device, queue: int = 1) -> list[tuple[float, float]]:
    """Return the milliseconds of forward and backward, on a GPU of so many iterations that are queued together."""
    return _time_cuda(step, queue) if device.type == "cuda" else _time_cpu(step, queue)


def time_interleaved(
    steps: Mapping[str, Step], device: torch.device, *, seconds: float, min_rounds: int, max_rounds: int = 100
) -> tuple[dict[str, dict[str, Spread]], dict[str, Exception]]:
    """Time all steps in turn, round after round, so that noise and clock changes affect them alike.

    The rounds last about ``seconds``; there are at least ``min_rounds``, at most ``max_rounds``. The steps should have
    run before. Return the spread of ``"fwd"``, ``"bwd"`` and ``"both"`` by step, and the error of each step that
    raised on a CPU, which is not run again.
    """
    queues = _warm_up(steps) if device.type == "cuda" else dict.fromkeys(steps, 1)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    errors: dict[str, Exception] = {}
    start = time.perf_counter()
    for finished in range(max_rounds):
        if finished >= min_rounds and time.perf_counter() - start > seconds:
            break
        for name in list(samples):
            try:
                samples[name] += time_once(steps[name], device, queues[name])
            except Exception as error:
                if device.type == "cuda":  # nothing runs on a GPU after an illegal access
                    raise
                errors[name] = error
                del samples[name]
    return {name: spreads_of(times) for name, times in samples.items()}, errors


def _warm_up(steps: Mapping[str, Step]) -> dict[str, int]:
    """Run all steps until the clocks have settled; return how many iterations of each to queue at a time."""
    start = time.perf_counter()
    while True:
        times = {name: sum(_time_cuda(step, 1)[0]) for name, step in steps.items()}
        if time.perf_counter() - start > _WARM_UP_SECONDS:
            return {name: _CUDA_QUEUE if ms < _SHORT_MS else 1 for name, ms in times.items()}


def spreads_of(times: Sequence[tuple[float, float]]) -> dict[str, Spread]:
    """Return the spread of each mode of some times of forward and backward, in milliseconds."""
    halves = torch.tensor(times, dtype=torch.float64).T
    levels = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    series = zip(MODES, (*halves, halves.sum(0)), strict=True)
    return {mode: Spread(*torch.quantile(values, levels).round(decimals=4).tolist()) for mode, values in series}


def matmul_step(n: int, m: int, d: int, dtype: torch.dtype, device: torch.device) -> tuple[Step, float]:
    """Return the two products of a dense loss, X Yᵀ and S Y, by ``torch.mm``, and the FLOP of each.

    The faster one is the yardstick: with few features the first is bound by writing S.
    """
    rows = max(1, min(n, _YARDSTICK_PAIRS // m))
    x, y = (torch.randn(length, d, device=device).to(dtype) for length in (rows, m))
    s, dx = x.new_empty(rows, m), torch.empty_like(x)
    return Step(lambda: torch.mm(x, y.T, out=s), lambda s: {"dx": torch.mm(s, y, out=dx)}), 2.0 * rows * m * d


def kernel_launches(step: Step) -> int:
    """Return how many kernels one iteration runs on the GPU, without copies and fills by the driver."""
    step.run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step.run()
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)


def peak_extra_mib(step: Step, device: torch.device) -> float:
    """Return the MiB that one iteration takes at its peak beyond its inputs and gradients.

    They are those of PyTorch's allocator, to the byte. On a CPU the resident memory of the process also has what the C
    library keeps for reuse, which is more than a small step takes. Buffers that the allocator does not see, of the BLAS
    and of the threads, do not grow with the rows.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = step.run()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        with _silent():
            profile.start()
        try:
            gradients = step.run()
        finally:
            with _silent():
                profile.stop()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        peak = max(accumulate((event.nbytes() for event in events), initial=0))
    gradient_bytes = sum(gradient.nbytes for gradient in gradients.values())
    return round(max(0.0, (peak - gradient_bytes) / MIB), 2)


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what the profiler writes to the standard error at its start and its end."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
