"""The place of this process among those that ``torchrun`` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def joined() -> Iterator[torch.device]:
    """Be a rank of the processes that torchrun started, or a group of one; yield this rank's device.

    Every rank has a GPU of its own, or all have the CPU. A group that is there already is used and stays.
    """
    if dist.is_initialized():
        yield torch.device("cpu")
        return
    here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cuda", here[0]) if torch.cuda.device_count() >= here[1] else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group()
    else:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device
    finally:
        dist.destroy_process_group()
