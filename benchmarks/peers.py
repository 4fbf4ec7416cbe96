"""Public kernels as providers, each through its documented call. They need a GPU.

None of them comes with this package; those that are installed are measured after the same check as ours.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .eager import Unavailable, clip_by, info_nce_by

# Each package is imported at its first call, because some query the driver at import.


def _target(query: Tensor) -> Tensor:
    return torch.arange(len(query), device=query.device)


def _inf_cl(query: Tensor, key: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    # head_dim, the columns of a tile, must divide D.
    return cal_flash_loss(query, key, head_dim=math.gcd(256, query.shape[1])).mean()


def _liger(query: Tensor, key: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    # By default the gradient of the weight is summed in bfloat16.
    return LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)(key, query, _target(query))


def _cce(query: Tensor, key: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    # By default small gradients, those of the negatives, are skipped.
    return linear_cross_entropy(query, key, _target(query), filter_eps=None)


def _quack(query: Tensor, key: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(query, key, _target(query))


def _memeff(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    from memeff import MemoryEfficientCLIPLoss

    # The temperature is a float without gradient, so the scale multiplies the rows; stable=True changes the gradient.
    loss = MemoryEfficientCLIPLoss(temperature=1.0, normalized_inputs=True, stable=False)
    return loss(logit_scale * image_features, text_features)


def _siglip_kernel(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss(image_features, text_features, logit_scale.log(), logit_bias)


class Peer(NamedTuple):
    """A package, by its import name, and the losses that it computes."""

    package: str
    losses: Mapping[str, Callable[..., Tensor]]


def _of_rows(package: str, row_loss: Callable[[Tensor, Tensor], Tensor]) -> Peer:
    return Peer(package, {"info_nce": info_nce_by(row_loss), "clip": clip_by(row_loss)})


PEERS = {
    "inf-cl": _of_rows("inf_cl", _inf_cl),
    "liger": _of_rows("liger_kernel", _liger),
    "cce": _of_rows("cut_cross_entropy", _cce),
    "quack": _of_rows("quack", _quack),
    "memeff": Peer("memeff", {"clip": _memeff}),
    "siglip-kernel": Peer("siglip_kernel", {"siglip": _siglip_kernel}),
}


def importable(peers: Mapping[str, Peer] = PEERS) -> list[str]:
    """Return the names of the installed peers."""
    return [name for name, peer in peers.items() if importlib.util.find_spec(peer.package) is not None]


def loss_function(name: str, loss: str, peers: Mapping[str, Peer] = PEERS) -> Callable[..., Tensor]:
    """Return a peer's function for a loss; raise `Unavailable` if there is none or the peer is not installed."""
    peer = peers[name]
    if loss not in peer.losses:
        raise Unavailable("does not compute this loss")
    if name not in importable(peers):
        raise Unavailable(f"{peer.package} is not installed")
    return peer.losses[loss]
