"""CLIP and SigLIP models of transformers whose loss is computed without their logits: `patch_transformers`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from contrastive_kernels.compat import _towers
from contrastive_kernels.compat._patch import Patch
from contrastive_kernels.compat._peer import forwarding, import_peer

__all__ = ["patch_transformers"]

DISTRIBUTION = "transformers"

_clip = import_peer("transformers.models.clip.modeling_clip", DISTRIBUTION)
_siglip = import_peer("transformers.models.siglip.modeling_siglip", DISTRIBUTION)

__getattr__ = forwarding(__name__, DISTRIBUTION, "transformers")

MODELS = (_clip.CLIPModel, _siglip.SiglipModel)
# Releases from 5.1 on project the features of CLIP in these methods, and the pooled outputs that they return are the
# projected ones.
_PROJECTING = "get_image_features" in inspect.unwrap(_clip.CLIPModel.forward).__code__.co_names


def patch_transformers(model: nn.Module | None = None) -> Patch:
    """Let ``model(..., return_loss=True)`` compute its loss from the embeddings, without the N x N logits.

    The logits of such an output are None; its loss, embeddings and encoder outputs are as before, and so is every call
    without ``return_loss=True``. Subclasses of `CLIPModel` and `SiglipModel` that have a ``forward`` of their own are
    left alone.

    Args:
        model: this model alone. None: all models of these classes, made before and after.

    Returns:
        What puts the original back: `Patch.undo`, or the end of a ``with`` block.

    Raises:
        TypeError: a model of another class, or whose ``forward`` is replaced already, as `accelerate` does.

    Example:
        >>> from contrastive_kernels.compat.transformers import patch_transformers
        >>> from transformers import CLIPConfig, CLIPModel
        >>> patch = patch_transformers(CLIPModel(CLIPConfig()))  # doctest: +SKIP
    """
    if model is None:
        return Patch(*((base, "forward", _without_logits(base, base.forward)) for base in MODELS))
    base = next((base for base in MODELS if isinstance(model, base) and type(model).forward is base.forward), None)
    if base is None:
        raise TypeError(
            f"patch_transformers takes a CLIPModel or SiglipModel of transformers, or a subclass with their forward, "
            f"not {type(model).__name__}; of a wrapped model it takes what is inside"
        )
    found = vars(model).get("forward")
    # ours, or, in a model that was pickled with a patch, that of its class
    known = isinstance(found, MethodType) and (
        found.__func__ is type(model).forward or hasattr(found.__func__, "_without_logits")
    )
    if found is not None and not known:
        raise TypeError("the forward of this model was replaced, by accelerate perhaps; patch the model before that")
    forward = _without_logits(base, type(model).forward if found is None else found.__func__)
    return Patch((model, "forward", MethodType(forward, model)))


def _without_logits(base: Any, found: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward for models of a class, in place of the one found."""
    signature = inspect.signature(found)
    named = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    defaults = {p.name: p.default for p in named}

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**defaults, **dict(zip(defaults, args)), **kwargs}  # noqa: B905, of too many the original says so
        # a forward of a subclass may read the logits
        if not given.pop("return_loss") or len(args) > len(defaults) or type(self).forward is not base.forward:
            return found(self, *args, **kwargs)
        return_dict = given.pop("return_dict", None)
        text = {name: given.pop(name) for name in ("input_ids", "attention_mask", "position_ids")}
        vision = {name: given.pop(name) for name in ("pixel_values", "interpolate_pos_encoding")}
        for name in ("output_attentions", "output_hidden_states"):
            if name in defaults and given[name] is None:  # releases before 5: both towers get those of the model
                given[name] = getattr(self.config, name)
        out = _output(self, vision | given, text | given)
        if out is None:
            return found(self, *args, **kwargs)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return out if as_dict else out.to_tuple()

    functools.update_wrapper(forward, found)
    # The signature stays, the link to the original does not: accelerate would follow it to take its own wrappers off.
    del forward.__wrapped__  # type: ignore[attr-defined]
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward._without_logits = True  # type: ignore[attr-defined]
    return forward


def _output(model: Any, vision: dict[str, Any], text: dict[str, Any]) -> Any:
    """Return what a model gives for the inputs of its towers, without logits; None where they are no pairs."""
    is_clip = isinstance(model, _clip.CLIPModel)
    if is_clip and _PROJECTING:
        outputs = model.get_image_features(**vision), model.get_text_features(**text)
        image, words = (output.pooler_output for output in outputs)
    else:
        outputs = model.vision_model(**vision), model.text_model(**text)
        image, words = (output.pooler_output for output in outputs)
        if is_clip:
            image, words = model.visual_projection(image), model.text_projection(words)
    norm = _clip._get_vector_norm if is_clip else functools.partial(torch.norm, p=2, dim=-1, keepdim=True)
    image, words = image / norm(image), words / norm(words)
    x, y, scale = words, image.to(words.device), model.logit_scale.exp().to(words.device)
    if not _towers.fit(x, y):
        return None
    if is_clip:
        loss, kind = _towers.clip(x, y, scale), _clip.CLIPOutput
    else:
        loss, kind = _towers.siglip(x, y, scale, model.logit_bias.to(words.device)), _siglip.SiglipOutput
    return kind(
        loss=loss,
        text_embeds=words,
        image_embeds=image,
        text_model_output=outputs[1],
        vision_model_output=outputs[0],
    )
