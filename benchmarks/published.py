"""Published losses over a group of processes, each through its documented call.

`make bench-distributed` installs the packages without their dependencies, as `make test-peers` does.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from .eager import TEMPERATURE
from .libraries import lightly, open_clip, sentence_transformers, sentences
from .peers import LIBRARIES


def _clip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    loss = open_clip().ClipLoss(local_loss=True, gather_with_grad=True, **place)
    return loss(image_features, text_features, logit_scale)


def _siglip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    loss = open_clip().SigLipLoss(rank=dist.get_rank(), world_size=dist.get_world_size())
    return loss(image_features, text_features, logit_scale, logit_bias)


def _nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
    return lightly().NTXentLoss(TEMPERATURE, gather_distributed=True)(z0, z1)


def _info_nce(query: Tensor, positive_key: Tensor) -> Tensor:
    loss = sentence_transformers("MultipleNegativesRankingLoss", scale=1 / TEMPERATURE, gather_across_devices=True)
    return loss(sentences(query, positive_key), None)


PEERS = {
    name: LIBRARIES[name]._replace(losses=losses)
    for name, losses in {
        "open_clip": {"clip": _clip, "siglip": _siglip},
        "lightly": {"nt_xent": _nt_xent},
        "sentence-transformers": {"info_nce": _info_nce},
    }.items()
}
