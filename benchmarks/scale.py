"""``python -m benchmarks.scale``: what a loss over many GPUs should cost, by a model. Nothing here is measured.

Every rank has n rows of N = ranks * n and the sweep takes its products at a fixed rate. In ours, slices of the other
ranks' rows arrive while the one before is swept, the first one during the sweep of the rank's own rows, in the forward
and again in the backward; gradients of a slice go home in float32 after its sweep. Of x with itself two ranks sweep
what they have in common once, but few rows twice in the backward, so that no gradient travels. Who gathers waits for
all rows, then holds n x N matrices and moves them through memory, and sends gradients home in the dtype of the
features. A collective takes a latency and its bytes over the bus bandwidth, which falls with the logarithm of the
number of nodes. The defaults are data sheets and public all-gather benchmarks of H100 nodes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from contrastive_kernels.engine.groups import ROWS_TO_PUSH

from .cases import DENSE_COPIES
from .options import at_least

MIB = 2**20
# Of a slice two live at a time, and a block may be a copy of one; of its gradient one, in float32, and that of a block.
SLICES, SLICE_GRADIENTS = 3, 2
# Nodes at which the bandwidth across nodes was read.
MANY_NODES = 128


@dataclass(frozen=True)
class Loss:
    """How a loss is computed: of x with itself or not, and by who gathers.

    The latter takes so many products of n x N x D, holds so many n x N matrices and gathers so many features, in units
    of N x D; we gather one.
    """

    symmetric: bool
    products: int
    matrices: int
    towers: int

    def passes(self, ranks: int, rows: int) -> list[tuple[float, bool]]:
        """Return our products of n x N x D in forward and backward, and whether gradients of others travel."""
        if not self.symmetric:
            return [(1.0, False), (3.0, True)]
        twice = ranks > 1 and rows < ROWS_TO_PUSH["cuda"]
        return [(0.5, False), (2.0, False) if twice else (1.5, True)]


LOSSES = {
    # one sweep of image x text instead of two matrices, one a direction
    "clip": Loss(symmetric=False, products=6, matrices=2, towers=2),
    # the rows are those of both views
    "nt_xent": Loss(symmetric=True, products=3, matrices=1, towers=1),
}


@dataclass(frozen=True)
class Machine:
    """GPUs and what connects them, in FLOP, bytes and seconds."""

    flops: float = 0.75 * 790e12
    memory_bandwidth: float = 3.35e12
    node: int = 8
    bandwidth_in_node: float = 360e9
    bandwidth_across: float = 200e9
    latency: float = 30e-6
    workspace: float = 512 * MIB

    def bandwidth(self, ranks: int) -> float:
        """Return the bus bandwidth of a collective, in bytes a second."""
        nodes = max(1.0, ranks / self.node)
        fallen = min(1.0, math.log(nodes, MANY_NODES))
        return self.bandwidth_in_node + (self.bandwidth_across - self.bandwidth_in_node) * fallen

    def collective(self, size: float, ranks: int, calls: int = 1) -> float:
        """Return the seconds of some all-gathers, or reduce-scatters, of so many bytes of all ranks together."""
        return 0.0 if ranks == 1 else calls * self.latency + size * (ranks - 1) / ranks / self.bandwidth(ranks)


@dataclass(frozen=True)
class Cost:
    """Of forward and backward on a rank: seconds of the products, of what travels, of all; bytes beyond the inputs."""

    products: float
    traffic: float
    step: float
    memory: float


def row_bytes(d: int, itemsize: int, push: bool) -> int:
    """Return what a row of a slice takes."""
    return SLICES * d * itemsize + (SLICE_GRADIENTS * 4 * d if push else 0)


def slices(ranks: int, rows: int, of_row: int, workspace: float) -> int:
    """Return in how many slices the rows of the other ranks arrive in one pass."""
    step = min(rows, max(1, int(workspace // (ranks * of_row))))
    return -(-rows // step)


def ours(loss: Loss, ranks: int, rows: int, d: int, itemsize: int, machine: Machine) -> Cost:
    """Return the cost of the sweep over a group."""
    n = ranks * rows
    features, gradients = n * d * itemsize, 4 * n * d
    product = 2.0 * rows * n * d / machine.flops
    products = traffic = step = received = 0.0
    for number, push in loss.passes(ranks, rows):
        of_row = row_bytes(d, itemsize, push)
        count = slices(ranks, rows, of_row, machine.workspace)
        own = number * product / ranks
        of_slice = (number * product - own) / count
        arrives = machine.collective(features, ranks, count) / count
        home = machine.collective(gradients, ranks, count) if push else 0.0
        products += number * product
        traffic += count * arrives + home
        step += max(own, arrives) + (count - 1) * max(of_slice, arrives) + of_slice + home
        received = max(received, 0.0 if ranks == 1 else min(machine.workspace, float(n * of_row)))
    held = (1 if loss.symmetric else 2) * rows * d * (4 + itemsize)  # gradients, summed in float32
    return Cost(products, traffic, step, held + received)


def gathered(loss: Loss, ranks: int, rows: int, d: int, itemsize: int, machine: Machine) -> Cost:
    """Return the cost of gathering all rows and the dense loss of the rank's own."""
    n = ranks * rows
    features = float(loss.towers * n * d * itemsize)
    products = loss.products * 2.0 * rows * n * d / machine.flops
    matrix = float(rows * n * itemsize)
    # a matrix is written and read in the forward, its gradient written and read by two products
    moved = 5 * loss.matrices * matrix / machine.memory_bandwidth
    traffic = 2 * machine.collective(features, ranks, loss.towers)
    return Cost(products, traffic, products + moved + traffic, 2 * features + DENSE_COPIES * matrix)


def table(name: str, ranks: Sequence[int], rows: Sequence[int], dims: Sequence[int], machine: Machine) -> Table:
    """Return the costs of both for all combinations, in bfloat16."""
    found = Table(
        title=f"A model, not measured: {name}, forward + backward, bfloat16",
        caption="Milliseconds; GiB of a rank beyond the inputs. Traffic is partly hidden behind the products.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    headers = "N", "ranks", "rows\na rank", "D", "ours\nproducts", "\ntraffic", "\nstep", "\nGiB"
    for header in (*headers, "gathered\nstep", "\nGiB", "times\nours"):
        found.add_column(header, justify="right")
    for d in dims:
        for n in rows:
            for world in ranks:
                mine, theirs = (cost(LOSSES[name], world, n, d, 2, machine) for cost in (ours, gathered))
                ms = [f"{1e3 * seconds:,.2f}" for seconds in (mine.products, mine.traffic, mine.step)]
                found.add_row(
                    *(f"{number:,}" for number in (world * n, world, n, d)),
                    *ms,
                    f"{mine.memory / 2**30:.2f}",
                    f"{1e3 * theirs.step:,.2f}",
                    f"{theirs.memory / 2**30:,.2f}",
                    f"{theirs.step / mine.step:.1f}",
                )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and print the table."""
    default = Machine()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--loss", choices=LOSSES, default="clip")
    parser.add_argument("--ranks", nargs="+", type=at_least(1, int), default=[8, 64, 256, 1024])
    parser.add_argument("--rows", nargs="+", type=at_least(1, int), default=[1024, 4096, 16384], help="of a rank")
    parser.add_argument("--dims", nargs="+", type=at_least(1, int), default=[512])
    positive = at_least(1e-9, float)
    parser.add_argument("--tflops", type=positive, default=default.flops / 1e12, help="of a rank's products")
    parser.add_argument("--memory-gbs", type=positive, default=default.memory_bandwidth / 1e9, help="of a rank, GB/s")
    parser.add_argument("--node", type=at_least(1, int), default=default.node, help="ranks of a node")
    parser.add_argument("--node-gbs", type=positive, default=default.bandwidth_in_node / 1e9, help="bus of one node")
    parser.add_argument(
        "--across-gbs", type=positive, default=default.bandwidth_across / 1e9, help=f"bus of {MANY_NODES} nodes, GB/s"
    )
    parser.add_argument("--latency", type=at_least(0, float), default=1e6 * default.latency, help="µs of a collective")
    parser.add_argument("--workspace", type=positive, default=default.workspace / MIB, help="MiB, set_workspace_limit")
    options = parser.parse_args(arguments)
    machine = Machine(
        flops=1e12 * options.tflops,
        memory_bandwidth=1e9 * options.memory_gbs,
        node=options.node,
        bandwidth_in_node=1e9 * options.node_gbs,
        bandwidth_across=1e9 * options.across_gbs,
        latency=1e-6 * options.latency,
        workspace=MIB * options.workspace,
    )
    Console(width=100).print(table(options.loss, options.ranks, options.rows, options.dims, machine))


if __name__ == "__main__":
    main()
