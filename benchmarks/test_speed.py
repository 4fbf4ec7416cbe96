"""The comparison as cases of pytest-benchmark: ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

import pytest
import torch

from .cases import LOSSES, Case, Unavailable, check, gradients, provider_function

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("provider", ["ours", "eager", "linear_cross_entropy"])
@pytest.mark.parametrize("loss", LOSSES)
def test_forward_backward(benchmark, loss, provider):
    case = Case(loss, n=LOSSES[loss].sizes[0], d=128, dtype=torch.float32)
    try:
        check(provider, case, DEVICE)
    except Unavailable as reason:
        pytest.skip(str(reason))
    function, inputs = provider_function(provider, case, DEVICE), case.inputs(DEVICE)

    def forward_backward():
        gradients(function(**inputs), inputs)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = str(case)
    benchmark(forward_backward)
