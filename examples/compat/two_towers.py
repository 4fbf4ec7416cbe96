"""A small CLIP of open_clip on synthetic pairs, trained with the losses of open_clip and with ours.

``python -m examples.compat.two_towers`` needs open-clip-torch (with torchvision) and no network. What changes is one
line before the trainer makes its loss, or one import:

    contrastive_kernels.compat.patch_open_clip()
    from contrastive_kernels.compat.open_clip import ClipLoss
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import ModuleType

import open_clip
import torch
from open_clip import loss as original
from torch import Tensor

from contrastive_kernels.compat import open_clip as ours
from examples.compat._curves import side_by_side

CONCEPTS, WORDS, LENGTH = 64, 200, 8
LOSSES = ("ClipLoss", "SigLipLoss")


def make_model(dtype: torch.dtype) -> open_clip.CLIP:
    """Return a CLIP of two small transformers with random weights."""
    return open_clip.CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 16, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16},
        text_cfg={"context_length": LENGTH, "vocab_size": WORDS, "layers": 2, "width": 32, "heads": 2},
        init_logit_bias=-10.0,
        output_dict=True,
    ).to(dtype)


def make_pairs(number: int, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return noisy images of concepts, and texts of some of the words that belong to them and of others."""
    patterns = torch.randn(CONCEPTS, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    concepts = torch.randint(CONCEPTS, (number,), generator=generator)
    images = patterns[concepts] + 0.5 * torch.randn(number, 3, 16, 16, generator=generator)
    words = 1 + (3 * concepts[:, None] + torch.randint(3, (number, LENGTH), generator=generator)) % (WORDS - 2)
    words[:, -1] = WORDS - 1  # the largest number ends a text
    return images.to(dtype), words


def train(losses: ModuleType, name: str, steps: int, batch_size: int, dtype: torch.dtype) -> list[float]:
    """Return the losses of every step of a training."""
    model, generator = make_model(dtype), torch.Generator().manual_seed(0)
    loss = getattr(losses, name)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    curve = []
    for _ in range(steps):
        output = model(*make_pairs(batch_size, generator, dtype))
        if name == "ClipLoss":
            del output["logit_bias"]
        value = loss(**output, output_dict=True)["contrastive_loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        curve.append(value.item())
    return curve


def main(arguments: Sequence[str] | None = None) -> float:
    """Train with both losses, print the curves, and return their largest difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=LOSSES, default=LOSSES[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    options = parser.parse_args(arguments)
    dtype: torch.dtype = getattr(torch, options.dtype)
    return side_by_side(
        f"open_clip {options.loss}",
        lambda losses: train(losses, options.loss, options.steps, options.batch_size, dtype),
        original,
        ours,
    )


if __name__ == "__main__":
    main()
