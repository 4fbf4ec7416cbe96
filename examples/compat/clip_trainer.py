"""A small CLIP of transformers on synthetic pairs, trained by its Trainer as it is and patched.

``python -m examples.compat.clip_trainer`` needs transformers and accelerate, and no network. What changes is one line:

    contrastive_kernels.compat.patch_transformers(model)
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments, default_data_collator
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from contrastive_kernels.compat import patch_transformers
from examples.compat._curves import side_by_side

CONCEPTS, WORDS, LENGTH = 64, 200, 8
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


class Pairs(Dataset[dict[str, Tensor]]):
    """Noisy images of concepts, and texts of the words that belong to them.

    Args:
        number: of pairs.
    """

    def __init__(self, number: int) -> None:
        generator = torch.Generator().manual_seed(0)
        patterns = torch.randn(CONCEPTS, 3, 16, 16, generator=generator)
        concepts = torch.randint(CONCEPTS, (number,), generator=generator)
        self.images = patterns[concepts] + 0.5 * torch.randn(number, 3, 16, 16, generator=generator)
        self.texts = 3 * concepts[:, None] % (WORDS - 10) + torch.randint(3, (number, LENGTH), generator=generator)
        self.texts[:, -1] = WORDS - 1  # ends a text

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return an image and its text."""
        return {"pixel_values": self.images[index], "input_ids": self.texts[index]}


def make_model() -> CLIPModel:
    """Return a CLIP of two small transformers with random weights."""
    words = {"vocab_size": WORDS, "max_position_embeddings": LENGTH, "bos_token_id": 0, "eos_token_id": WORDS - 1}
    images = {"image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=TOWER | words, vision_config=TOWER | images, projection_dim=32))


def with_loss(rows: list[Any]) -> dict[str, Any]:
    """Return a batch, for which the model is to compute its loss."""
    return default_data_collator(rows) | {"return_loss": True}


def train(patched: bool, steps: int, batch_size: int) -> list[float]:
    """Return the losses of every step of a training."""
    model = make_model()
    if patched:
        patch_transformers(model)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        trainer = Trainer(model, settings, data_collator=with_loss, train_dataset=Pairs(4 * batch_size))
        trainer.pop_callback(next(type(c) for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__))
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(arguments: Sequence[str] | None = None) -> float:
    """Train the model as it is and patched, print the curves, and return their largest difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=256)
    options = parser.parse_args(arguments)
    disable_progress_bar()
    set_verbosity_error()
    return side_by_side(
        "CLIPModel under Trainer", lambda patched: train(patched, options.steps, options.batch_size), False, True
    )


if __name__ == "__main__":
    main()
