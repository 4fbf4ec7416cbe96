"""The cases of transformers: models of a tiny random configuration, with and without the patch."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

from contrastive_kernels.compat.check.case import Case, Draw

DISTRIBUTION = "transformers"
TEXT = {
    "vocab_size": 30,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 5,
    "bos_token_id": 0,
    "eos_token_id": 29,
    "pad_token_id": 1,
}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 4,
    "patch_size": 2,
}


def peer() -> ModuleType:
    """Return the module whose names the adapter has."""
    return importlib.import_module("transformers")


def model_of(transformers: Any, family: str, dtype: torch.dtype = torch.float64) -> Any:
    """Return a small model with random weights: ``"CLIP"`` or ``"Siglip"``."""
    config = getattr(transformers, f"{family}Config")
    options = {"projection_dim": 6} if family == "CLIP" else {}
    model = getattr(transformers, f"{family}Model")(config(text_config=TEXT, vision_config=VISION, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        model.logit_scale.fill_(2.0)
    return model.to(dtype)


def inputs_of(draw: Draw) -> dict[str, Any]:
    """Return texts and images of so many rows."""
    return {
        "input_ids": draw.integers(30, draw.n, 5),
        "pixel_values": draw.rows(draw.n, 3, 4, 4),
        "return_loss": True,
    }


def _case(family: str, **options: Any) -> Any:
    def run(module: Any, draw: Draw) -> Any:
        model = model_of(importlib.import_module("transformers"), family, draw.dtype)
        draw.leaves.extend(model.parameters())
        patch = getattr(module, "patch_transformers", None)  # the peer has none
        if patch is not None:
            patch(model)
        out = model(**inputs_of(draw), **options)
        return {
            "loss": out.loss,
            "text": out.text_embeds,
            "image": out.image_embeds,
            "pooled": out.vision_model_output.pooler_output,
            "hidden": out.text_model_output.last_hidden_state,
        }

    return run


CASES = (
    Case("CLIPModel", "return_loss=True", _case("CLIP")),
    Case("CLIPModel", "output_hidden_states=True", _case("CLIP", output_hidden_states=True)),
    Case("SiglipModel", "return_loss=True", _case("Siglip")),
)
