"""``python -m benchmarks.host_time``: what the launches of Triton kernels in a training step cost on the host, no GPU.

A driver that is not there takes the launches, so that no kernel runs and the driver's own time is missing: what is
left is Triton's Python and the package's. Launches that Triton binds each time and launches that are repeated take
turns, step by step; the least processor time of many is reported, in microseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import triton

import contrastive_kernels as ck
from contrastive_kernels.engine.backends import triton as backend
from contrastive_kernels.engine.backends.triton import launch
from tests.support.front_end import Host, replace_launches

ROWS, DEPTH, STEPS = 64, 128, 400


def losses() -> dict[str, Callable[[], torch.Tensor]]:
    """Return the losses of two batches of bfloat16 rows and a trained scale."""
    x, y = torch.randn(2, ROWS, DEPTH).bfloat16().unbind(0)
    x, y, scale = x.clone().requires_grad_(), y.clone().requires_grad_(), torch.tensor(10.0, requires_grad=True)
    return {
        "clip": lambda: ck.clip_loss(x, y, scale, normalize=True, backend="triton"),
        "nt_xent": lambda: ck.nt_xent_loss(x, y, logit_scale=scale, backend="triton"),
        "info_nce": lambda: ck.info_nce_loss(x, y, logit_scale=scale, backend="triton"),
        "siglip": lambda: ck.siglip_loss(x, y, scale, -1.0, normalize=True, backend="triton"),
    }


def main() -> None:
    torch.set_num_threads(1)
    print(f"Triton {triton.__version__}, {ROWS} rows, D = {DEPTH}: microseconds of a step")
    print(
        "| loss | launches | bound each time | repeated | the whole step, bound | repeated |\n|---|---|---|---|---|---|"
    )
    with pytest.MonkeyPatch.context() as patch:
        host, launch_kernel, spent = Host(patch), launch.launch_kernel, 0

        def timed(*arguments, **named) -> None:
            nonlocal spent
            begin = time.thread_time_ns()
            launch_kernel(*arguments, **named)
            spent += time.thread_time_ns() - begin

        replace_launches(patch, timed)
        patch.setattr(backend, "not_supported_reasons", lambda x: [])
        for name, loss in losses().items():
            in_launches: dict[bool, list[int]] = {False: [], True: []}
            in_steps: dict[bool, list[int]] = {False: [], True: []}
            for step in range(2 * STEPS):
                repeats = step % 2 == 1
                patch.setattr(launch, "REPEATS", repeats)
                host.started.clear()
                spent, begin = 0, time.thread_time_ns()
                loss().backward()
                in_steps[repeats].append(time.thread_time_ns() - begin)
                in_launches[repeats].append(spent)
            least = [min(times[repeats]) / 1e3 for times in (in_launches, in_steps) for repeats in (False, True)]
            print(
                f"| {name} | {len(host.started)} | " + " | ".join(f"{value:.0f}" for value in least) + " |", flush=True
            )


if __name__ == "__main__":
    main()
