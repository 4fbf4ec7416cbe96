"""Other packages as providers, each through its documented call: public kernels, which need a GPU, and libraries.

None of them comes with this package; those that are installed are measured after the same check as ours.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import libraries
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
    """A package by its import name and its name on the index, and the losses that it computes.

    ``matrices`` returns about how many N × M matrices it holds at its peak, by loss and N.
    """

    package: str
    distribution: str
    losses: Mapping[str, Callable[..., Tensor]]
    matrices: Callable[[str, int], float] = lambda loss, n: 0


def _of_rows(package: str, distribution: str, row_loss: Callable[[Tensor, Tensor], Tensor]) -> Peer:
    return Peer(package, distribution, {"info_nce": info_nce_by(row_loss), "clip": clip_by(row_loss)})


KERNELS = {
    "inf-cl": _of_rows("inf_cl", "inf-cl", _inf_cl),
    "liger": _of_rows("liger_kernel", "liger-kernel", _liger),
    "cce": _of_rows("cut_cross_entropy", "cut-cross-entropy", _cce),
    "quack": _of_rows("quack", "quack-kernels", _quack),
    "memeff": Peer("memeff", "memeff", {"clip": _memeff}),
    "siglip-kernel": Peer("siglip_kernel", "siglip-kernel", {"siglip": _siglip_kernel}),
}


def _metric_learning_matrices(loss: str, n: int) -> float:
    # every positive pair holds a matrix of its own
    return 4.3 * n if loss in ("nt_xent", "info_nce") else 13


LIBRARIES = {
    "open_clip": Peer(
        "open_clip",
        "open-clip-torch",
        {"clip": libraries.open_clip_clip, "siglip": libraries.open_clip_siglip},
        matrices=lambda loss, n: 5,
    ),
    "lightly": Peer(
        "lightly",
        "lightly",
        {
            "nt_xent": libraries.lightly_nt_xent,
            "decoupled": libraries.lightly_decoupled,
            "moco": libraries.lightly_moco,
            "barlow_twins": libraries.lightly_barlow_twins,
            "vicreg": libraries.lightly_vicreg,
        },
        matrices=lambda loss, n: 4,
    ),
    "metric-learning": Peer(
        "pytorch_metric_learning",
        "pytorch-metric-learning",
        {
            "nt_xent": libraries.metric_learning_nt_xent,
            "info_nce": libraries.metric_learning_info_nce,
            "sup_con": libraries.metric_learning_sup_con,
            "triplet_margin": libraries.metric_learning_triplet_margin,
        },
        matrices=_metric_learning_matrices,
    ),
    "sentence-transformers": Peer(
        "sentence_transformers",
        "sentence-transformers",
        {"info_nce": libraries.sentence_transformers_info_nce},
        matrices=lambda loss, n: 4,
    ),
    "sentence-transformers-cached": Peer(
        "sentence_transformers", "sentence-transformers", {"info_nce": libraries.cached_info_nce}
    ),
    "info-nce-pytorch": Peer(
        "info_nce", "info-nce-pytorch", {"info_nce": libraries.info_nce_pytorch}, lambda loss, n: 3
    ),
}
PEERS = KERNELS | LIBRARIES


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


def version(name: str, peers: Mapping[str, Peer] = PEERS) -> str:
    """Return the installed version of a provider that is a peer, else ``""``."""
    try:
        return importlib.metadata.version(peers[name].distribution)
    except (KeyError, importlib.metadata.PackageNotFoundError):
        return ""
