"""Losses of open_clip under their own names: ``from contrastive_kernels.compat.open_clip import ClipLoss``."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from torch import Tensor

from contrastive_kernels.compat import _towers
from contrastive_kernels.compat._distill import distilled_clip
from contrastive_kernels.compat._patch import Patch
from contrastive_kernels.compat._peer import forwarding, import_peer, warn_dense

__all__ = ["ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss", "create_loss", "patch_open_clip"]

DISTRIBUTION = "open-clip-torch"
# Of open_clip and its trainer, which older releases call "training".
PACKAGES = ("open_clip", "open_clip_train", "training")

_peer: Any = import_peer("open_clip.loss", DISTRIBUTION)
_create_loss = import_peer("open_clip.factory", DISTRIBUTION).create_loss

__getattr__ = forwarding(__name__, DISTRIBUTION, "open_clip", "open_clip.loss")


class ClipLoss(_peer.ClipLoss):
    r"""CLIP's loss, `open_clip.ClipLoss`, without the N x N logits.

    .. math:: L = \frac{1}{2N} \sum_i \Bigl[ \log \sum_j e^{u_{ij}} - u_{ii} \Bigr]
                + \frac{1}{2N} \sum_j \Bigl[ \log \sum_i e^{u_{ij}} - u_{jj} \Bigr],
        \qquad u_{ij} = a \langle x_i, y_j \rangle

    Args:
        local_loss: with several ranks, the loss of this rank's rows among those of all ranks.
        gather_with_grad: with several ranks, gradients cross them.
        cache_labels: kept; no labels are made.
        rank: of this process.
        world_size: the number of processes; above 1 the features are gathered by `open_clip.loss.gather_features`.
        use_horovod: gather by Horovod.

    Source: Radford et al., ICML 2021, arXiv:2103.00020, figure 3; `open_clip.loss.ClipLoss`.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.open_clip import ClipLoss
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 16, 8), dim=-1).unbind(0)
        >>> ClipLoss()(image, text, logit_scale=torch.tensor(14.3), output_dict=True).keys()
        dict_keys(['contrastive_loss'])
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """Return the loss, in a dictionary if asked for.

        Args:
            image_features: x, ``(N, D)``, taken as they are.
            text_features: y, ``(N, D)``.
            logit_scale: a, exponentiated; a float or a tensor of one element.
            logit_bias: cancels; its gradient is 0.
            output_dict: return ``{"contrastive_loss": loss}``.
        """
        if _dense(self, ClipLoss, logit_scale, logit_bias) or not _towers.fit(image_features, text_features):
            return super().forward(image_features, text_features, logit_scale, logit_bias, output_dict)
        loss = self._fused(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _fused(self, x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor | None) -> Tensor:
        if self.world_size == 1:
            return _towers.clip(x, y, scale, bias)
        all_x, all_y = _peer.gather_features(
            x,
            y,
            local_loss=self.local_loss,
            gather_with_grad=self.gather_with_grad,
            rank=self.rank,
            world_size=self.world_size,
            use_horovod=self.use_horovod,
        )
        if not self.local_loss:
            return _towers.clip(all_x, all_y, scale, bias)
        return _towers.clip_own_rows(x, y, all_x, all_y, self.rank * x.shape[0], scale, bias)


class CoCaLoss(_peer.CoCaLoss, ClipLoss):
    """CoCa's two losses, `open_clip.CoCaLoss`: the contrastive one is that of `ClipLoss`, the caption's is the peer's.

    Args:
        caption_loss_weight: factor of the caption's cross-entropy.
        clip_loss_weight: factor of the contrastive loss; 0: it is not computed.
        pad_id: label that the caption's loss ignores.
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as in `ClipLoss`.

    Source: Yu et al., TMLR 2022, arXiv:2205.01917; `open_clip.loss.CoCaLoss`.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.open_clip import CoCaLoss
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 16, 8), dim=-1).unbind(0)
        >>> logits, labels = torch.randn(16, 5, 30), torch.randint(30, (16, 5))
        >>> contrastive, caption = CoCaLoss(2.0, 1.0)(image, text, logits, labels, logit_scale=torch.tensor(14.3))
    """


class DistillClipLoss(_peer.DistillClipLoss, ClipLoss):
    r"""CLIP's loss and the cross-entropy from a teacher's softmax, `open_clip.DistillClipLoss`, without N x N logits.

    .. math:: L' = \frac{1}{2N} \sum_i \Bigl[ \log \sum_j e^{u_{ij}} - \sum_j p_{ij} u_{ij} \Bigr]
                + \frac{1}{2N} \sum_j \Bigl[ \log \sum_i e^{u_{ij}} - \sum_i q_{ij} u_{ij} \Bigr],

    p and q being the softmax of the teacher's logits over texts and over images.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as in `ClipLoss`; with several
            ranks the logits are stored.

    Source: Wu et al., ICCV 2023, arXiv:2309.12314; `open_clip.loss.DistillClipLoss`.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.open_clip import DistillClipLoss
        >>> image, text, *teacher = torch.nn.functional.normalize(torch.randn(4, 16, 8), dim=-1).unbind(0)
        >>> contrastive, distill = DistillClipLoss()(image, text, torch.tensor(14.3), *teacher, torch.tensor(100.0))
    """

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> Any:
        """Return the contrastive and the distillation loss, in a dictionary if asked for.

        Args:
            image_features, text_features, logit_scale: as in `ClipLoss`.
            dist_image_features: the teacher's, ``(N, D')``.
            dist_text_features: ``(N, D')``.
            dist_logit_scale: the teacher's scale, exponentiated.
            output_dict: return ``{"contrastive_loss": ..., "distill_loss": ...}``.
        """
        student, teacher = (image_features, text_features), (dist_image_features, dist_text_features)
        fits = _towers.fit(*student) and _towers.fit(*teacher) and len(image_features) == len(dist_image_features)
        if _dense(self, DistillClipLoss, logit_scale, dist_logit_scale) or not fits:
            peer: Any = super()
            return peer.forward(*student, logit_scale, *teacher, dist_logit_scale, output_dict)
        contrastive, distill = distilled_clip(*student, logit_scale, *teacher, dist_logit_scale)
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill


class SigLipLoss(_peer.SigLipLoss):
    r"""SigLIP's loss, `open_clip.loss.SigLipLoss`, without the N x N logits.

    .. math:: L = \frac1N \Bigl[ \sum_i \log(1 + e^{-u_{ii}}) + \sum_{i \ne j} \log(1 + e^{u_{ij}}) \Bigr],
        \qquad u_{ij} = a \langle x_i, y_j \rangle + b

    Args:
        cache_labels: kept; no labels are made.
        rank: of this process.
        world_size: the number of processes.
        dist_impl: how the peer's code exchanges their texts: ``"bidir"``, ``"shift"``, ``"reduce"`` or ``"gather"``.

    Source: Zhai, Mustafa, Kolesnikov, Beyer, ICCV 2023, arXiv:2303.15343; `open_clip.loss.SigLipLoss`.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.open_clip import SigLipLoss
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 16, 8), dim=-1).unbind(0)
        >>> SigLipLoss()(image, text, torch.tensor(10.0), torch.tensor(-10.0)).shape
        torch.Size([])
    """

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        negative_only: bool = False,
    ) -> Any:
        """Return the loss of these images and texts; with `negative_only` no text belongs to an image."""
        if _dense(self, SigLipLoss, logit_scale, logit_bias) or not _towers.fit(image_features, text_features):
            return super()._loss(image_features, text_features, logit_scale, logit_bias, negative_only)
        return _towers.siglip(image_features, text_features, logit_scale, logit_bias, negative_only)


REPLACED = {name: globals()[name] for name in ("ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss")}
_OURS = {getattr(_peer, name): ours for name, ours in REPLACED.items()}


def create_loss(args: Any) -> Any:
    """Return the loss that the options of open_clip's trainer ask for: `open_clip.create_loss`.

    Args:
        args: the trainer's options: model, siglip, distill, local_loss, gather_with_grad, rank, world_size, ...

    Raises:
        AssertionError: options that exclude each other.

    Example:
        >>> from contrastive_kernels.compat.open_clip import create_loss
        >>> options = dict(local_loss=False, gather_with_grad=False, rank=0, world_size=1, horovod=False)
        >>> args = argparse.Namespace(model="ViT-B-32", distill=False, siglip=False, **options)  # doctest: +SKIP
        >>> loss = create_loss(args)  # doctest: +SKIP
    """
    loss = _create_loss(args)
    loss.__class__ = _OURS.get(type(loss), type(loss))  # the state is the same
    return loss


def patch_open_clip() -> Patch:
    """Replace the losses and `create_loss` in every loaded module of open_clip and of its trainer.

    Losses that exist already stay what they are, and so do names that other modules have imported.

    Returns:
        What puts the original back: `Patch.undo`, or the end of a ``with`` block.

    Example:
        >>> from contrastive_kernels.compat.open_clip import patch_open_clip
        >>> with patch_open_clip():
        ...     open_clip.loss.ClipLoss is ClipLoss  # doctest: +SKIP
        True
    """
    new = {id(original): ours for original, ours in [*_OURS.items(), (_create_loss, create_loss)]}
    new |= {id(ours): ours for ours in new.values()}  # in a patch within another
    replacements = [
        (module, name, new[id(value)])
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType) and module.__name__.partition(".")[0] in PACKAGES
        for name, value in list(vars(module).items())
        if id(value) in new
    ]
    return Patch(*replacements)


def _dense(loss: Any, ours: type, *numbers: float | Tensor | None) -> bool:
    """Return whether the peer's own code has to compute a loss, and warn that this stores the logits."""
    option = None
    for name in ("get_logits", "get_ground_truth", "dist_loss"):
        if getattr(type(loss), name, None) is not getattr(ours, name, None):
            option = f"a {name} of a subclass"
    if ours is DistillClipLoss and loss.world_size > 1:
        option = "world_size > 1"
    if not _towers.single(*numbers):
        option = "a scale or bias of several numbers"
    if option is not None:
        warn_dense(type(loss).__name__, option)
    return option is not None
