"""SimCLR on handwritten digits under Lightning, with the NT-Xent of lightly and with ours.

``python -m examples.compat.digits_simclr`` needs lightly, pytorch-lightning and scikit-learn, and no network. What
changes is one import:

    from lightly.loss import NTXentLoss
    from contrastive_kernels.compat.lightly import NTXentLoss
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence

import pytorch_lightning as lightning
import torch
from lightly.loss import NTXentLoss as Original
from torch import Tensor, nn
from torch.utils.data import DataLoader

from contrastive_kernels.compat.lightly import NTXentLoss as Ours
from examples.compat._curves import side_by_side
from examples.digits import augment, load, make_model


class SimCLR(lightning.LightningModule):
    """An encoder of digits that is trained towards equal embeddings of two views.

    Args:
        loss: of the embeddings of both views.
        learning_rate: of Adam.
    """

    def __init__(self, loss: nn.Module, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.model = make_model()
        self.loss = loss
        self.learning_rate = learning_rate
        self.views = torch.Generator().manual_seed(0)
        self.curve: list[float] = []

    def training_step(self, images: Tensor, batch_index: int) -> Tensor:
        """Return the loss of two random views of the images."""
        z0, z1 = (self.model(augment(images, self.views)) for _ in range(2))
        value: Tensor = self.loss(z0, z1)
        self.curve.append(value.item())
        return value

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), self.learning_rate)


def train(loss: nn.Module, steps: int, batch_size: int) -> list[float]:
    """Return the losses of every step of a training."""
    model = SimCLR(loss)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    images = load(seed=0).train
    trainer.fit(model, DataLoader(images, batch_size, shuffle=True, drop_last=True))  # type: ignore[arg-type]
    return model.curve


def main(arguments: Sequence[str] | None = None) -> float:
    """Train with both losses, print the curves, and return their largest difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.2)
    options = parser.parse_args(arguments)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    return side_by_side(
        "NTXentLoss",
        lambda cls: train(cls(options.temperature), options.steps, options.batch_size),
        Original,
        Ours,
    )


if __name__ == "__main__":
    main()
