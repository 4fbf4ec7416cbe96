"""Two ranks train one tower in chunks: a program that writes the errors of the gradients.

Usage: python -m tests.support.chunked_ddp around|inside FOLDER, where DistributedDataParallel goes
"""

import copy
import json
import pathlib
import sys

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import contrastive_kernels as ck

RANKS, STEPS, ROWS = 2, 3, 22


def tower():
    torch.manual_seed(0)
    frozen = nn.Linear(8, 16).requires_grad_(False)
    return nn.Sequential(frozen, nn.GELU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)).double()


def gradients(model, rows):
    model.zero_grad()
    # both views at once: DistributedDataParallel takes one forward for each backward
    ck.nt_xent_loss(*model(rows).chunk(2)).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def work(rank, form, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=RANKS)
    plain = tower()
    encoder, small = copy.deepcopy(plain), 1e-4  # MiB of a bucket
    if form == "around":
        model = DistributedDataParallel(ck.ChunkedEncoder(encoder, chunk_size=5), bucket_cap_mb=small)
    else:
        model = ck.ChunkedEncoder(DistributedDataParallel(encoder, bucket_cap_mb=small), chunk_size=5)
    errors = []
    for _ in range(STEPS):
        batches = [torch.randn(2 * ROWS, 8, dtype=torch.float64) for _ in range(RANKS)]
        own = gradients(model, batches[rank])
        every = zip(*(gradients(plain, batch) for batch in batches), strict=True)
        errors.append(max((g - sum(parts) / RANKS).abs().max().item() for g, parts in zip(own, every, strict=True)))
    (pathlib.Path(folder) / f"{rank}.json").write_text(json.dumps(errors))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, tuple(sys.argv[1:]), RANKS)
