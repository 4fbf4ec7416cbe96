"""Encoders in chunks."""

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import contrastive_kernels as ck


def tower(x: Tensor) -> Tensor:
    return x.square()


def towers(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, y


x = torch.randn(8, 4)
assert_type(ck.encode_in_chunks(tower, x, 3), Tensor)
assert_type(ck.encode_in_chunks(towers, {"x": x, "y": x}, 3, keep_last=1), tuple[Tensor, Tensor])
z0, z1 = ck.encode_in_chunks(towers, (x, x), chunk_size=3)
ck.nt_xent_loss(z0, z1)
module = ck.ChunkedEncoder(nn.Linear(4, 2), chunk_size=3)
assert_type(module.chunk_size, int)
