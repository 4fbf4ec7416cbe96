"""The model of many GPUs: its arithmetic by hand, and its limits."""

from dataclasses import replace

import pytest

from benchmarks import scale

# 4 ranks of 1,000 rows with 100 features of 2 bytes: a product takes 0.8 ms, of which 0.2 are the rank's own rows.
MACHINE = scale.Machine(
    flops=1e12, memory_bandwidth=1e10, node=8, bandwidth_in_node=1e9, bandwidth_across=5e8, latency=1e-3, workspace=1e12
)
SIZES = 4, 1000, 100, 2
CLIP, NT_XENT = scale.LOSSES["clip"], scale.LOSSES["nt_xent"]
FREE = {"bandwidth_in_node": 1e30, "bandwidth_across": 1e30, "latency": 0.0}


def costs(cost, *expected):
    assert vars(cost) == pytest.approx(dict(zip(("products", "traffic", "step", "memory"), expected, strict=True)))


def test_ours_by_hand():
    """Rows arrive in 1.6 ms (1 of latency, 0.6 MB at 1 GB/s), gradients go home in 2.2."""
    # forward: max(0.2, 1.6) + 0.6; backward: max(0.6, 1.6) + 1.8 + 2.2
    costs(scale.ours(CLIP, *SIZES, MACHINE), 3.2e-3, 5.4e-3, 7.8e-3, 1.2e6 + 5.6e6)
    # half of the products forward: max(0.1, 1.6) + 0.3; two backward: max(0.4, 1.6) + 1.2
    costs(scale.ours(NT_XENT, *SIZES, MACHINE), 2.0e-3, 3.2e-3, 4.7e-3, 0.6e6 + 2.4e6)


def test_many_rows_with_themselves_by_hand():
    """4 ranks of 10,000 rows: 80 ms a product; rows arrive in 7 ms, gradients go home in 13."""
    # forward: max(10, 7) + 30; one and a half products backward: max(30, 7) + 90 + 13
    costs(scale.ours(NT_XENT, 4, 10_000, 100, 2, MACHINE), 0.160, 0.027, 0.173, 6e6 + 56e6)


def test_gathered_by_hand():
    """Two towers of 0.8 MB go there and back; matrices of 8 MB move five times."""
    costs(scale.gathered(CLIP, *SIZES, MACHINE), 4.8e-3, 6.4e-3, 4.8e-3 + 8e-3 + 6.4e-3, 3.2e6 + 32e6)
    costs(scale.gathered(NT_XENT, *SIZES, MACHINE), 2.4e-3, 3.2e-3, 2.4e-3 + 4e-3 + 3.2e-3, 1.6e6 + 32e6)


def test_slices_by_hand():
    """A row of all ranks takes 4 x 600 bytes forward, 4 x 1,400 backward, as gradients of others travel."""
    small = replace(MACHINE, workspace=1.2e6)  # 500 rows of every rank forward, 214 backward
    assert [scale.row_bytes(100, 2, push) for push in (False, True)] == [600, 1400]
    assert [scale.slices(4, 1000, of_row, 1.2e6) for of_row in (600, 1400)] == [2, 5]
    # 1.3 ms a slice of 0.3; forward: max(0.2, 1.3) + max(0.3, 1.3) + 0.3
    # backward: 1.12 ms a slice of 0.36; max(0.6, 1.12) + 4 x 1.12 + 0.36, and 5 x 1 + 1.2 for the gradients
    costs(scale.ours(CLIP, *SIZES, small), 3.2e-3, 2.6e-3 + 5.6e-3 + 6.2e-3, 2.9e-3 + 5.96e-3 + 6.2e-3, 2.4e6)


@pytest.mark.parametrize("loss", [CLIP, NT_XENT], ids=["clip", "nt_xent"])
@pytest.mark.parametrize("workspace", [1e12, 1e5])
def test_limits(loss, workspace):
    machine = replace(MACHINE, workspace=workspace)
    alone = scale.ours(loss, 1, 1000, 100, 2, machine)
    costs(alone, *((4 * 2e-4, 0.0, 4 * 2e-4, 1.2e6) if loss is CLIP else (2 * 2e-4, 0.0, 2 * 2e-4, 0.6e6)))
    hidden = scale.ours(loss, *SIZES, replace(machine, **FREE))
    assert hidden.step == pytest.approx(hidden.products)
    bound = scale.ours(loss, *SIZES, replace(machine, flops=1e30))
    assert bound.step == pytest.approx(bound.traffic)


def test_memory_is_bounded_where_gathering_grows():
    few, many = (scale.ours(CLIP, ranks, 4096, 512, 2, scale.Machine()).memory for ranks in (64, 4096))
    assert few == many
    few, many = (scale.gathered(CLIP, ranks, 4096, 512, 2, scale.Machine()).memory for ranks in (64, 4096))
    assert many == pytest.approx(64 * few)


@pytest.mark.parametrize(("ranks", "expected"), [(2, 1e9), (8, 1e9), (64, 1e9 - 5e8 * 3 / 7), (1024, 5e8), (9999, 5e8)])
def test_bandwidth_falls_with_the_nodes(ranks, expected):
    assert MACHINE.bandwidth(ranks) == pytest.approx(expected)


def test_command(capsys):
    """Options reach the model, and the table says what it is."""
    scale.main(["--ranks", "4", "--rows", "1000", "--dims", "100", "--tflops", "1", "--memory-gbs", "10",
                "--node-gbs", "1", "--across-gbs", "0.5", "--latency", "1000", "--workspace", "1000"])  # fmt: skip
    out = capsys.readouterr().out
    assert "A model, not measured: clip" in out
    assert "4,000 4 1,000 100 3.20 5.40 7.80 0.01 19.20 0.03 2.5" in " ".join(out.split())
