"""Processes of a group, started once: they run functions on their ranks and return what these return or raise."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

WORLD = 3
# What the processes import is imported once, by the server that they are forked from.
PRELOAD = [
    "torch._dynamo",
    "contrastive_kernels",
    "tests.support.testing",
    "examples.distributed",
    "benchmarks.distributed",
]
# Seconds that one function may take on all ranks together, and that the processes may take to start.
PATIENCE, START = 60, 300


class Raised(Exception):
    """What a function raised on a rank: the type's name and the text."""

    def __init__(self, kind: str, text: str, trace: str = "") -> None:
        super().__init__(kind, text, trace)
        self.kind, self.text, self.trace = kind, text, trace

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}\n{self.trace}"


def _serve(connection: Any, rank: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    # ranks 0 and 1 of the pair are the processes 1 and 2
    groups = {WORLD: dist.group.WORLD, 2: dist.new_group([1, 2]), 1: None}
    for process in range(WORLD):
        alone = dist.new_group([process])
        groups[1] = alone if process == rank else groups[1]
    connection.send_bytes(b"ready")
    while True:
        message = connection.recv_bytes()
        if not message:
            break
        try:
            function, world, arguments = pickle.loads(message)
            torch.manual_seed(0)
            result = function(groups[world], *arguments)
        except Exception as error:
            result = Raised(type(error).__name__, str(error), traceback.format_exc())
        connection.send_bytes(pickle.dumps(result))
    dist.destroy_process_group()


class Ranks:
    """A pool of processes: a group of all of them, of two, and of each alone."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start the processes."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.folder = tempfile.TemporaryDirectory()
        self.connections, self.processes = [], []
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # a process takes it from its parent
        for rank in range(WORLD):
            here, there = context.Pipe()
            arguments = there, rank, os.path.join(self.folder.name, "store")
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self.connections.append(here)
            self.processes.append(process)
        for here in self.connections:
            if not here.poll(START):
                raise TimeoutError("a process did not start")
            here.recv_bytes()
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads

    def outcomes(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what ``function(group, *arguments)`` returns on every rank of a group, or a `Raised`."""
        chosen = self.connections[-world:] if world == 2 else self.connections[:world]
        for connection in chosen:
            connection.send_bytes(pickle.dumps((function, world, arguments)))
        results = []
        for rank, connection in enumerate(chosen):
            if not connection.poll(PATIENCE):
                for process in self.processes:
                    process.kill()
                self.start()
                raise TimeoutError(f"rank {rank} of {world} did not come back from {function.__name__}")
            results.append(pickle.loads(connection.recv_bytes()))
        return results

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what the function returns on every rank; raise what it raises on any."""
        results = self.outcomes(world, function, *arguments)
        for result in results:
            if isinstance(result, Raised):
                raise result
        return results

    def close(self) -> None:
        """End the processes."""
        for connection, process in zip(self.connections, self.processes, strict=True):
            if process.is_alive():
                try:
                    connection.send_bytes(b"")
                    process.join(5)
                except OSError as error:
                    print(error, file=sys.stderr)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()
