"""open_clip's own trainer with open_clip's losses and patched."""

import importlib
import types

import pytest
import torch

from benchmarks import libraries
from contrastive_kernels.compat import _small, patch_open_clip
from tests.support.open_clip import open_clip, ours

pytestmark = pytest.mark.peers

with libraries.stand_ins():
    training = importlib.import_module("open_clip_train.train")

STEPS, BATCH = 20, 24
WORDS, LENGTH = 50, 6


class Loader(list):
    """Batches, as the trainer's loaders."""

    num_batches, num_samples = STEPS, STEPS * BATCH


def model_of(seed, kind):
    torch.manual_seed(seed)
    vision = {"image_size": 8, "patch_size": 4, "layers": 1, "width": 16, "head_width": 8}
    text = {"context_length": LENGTH, "vocab_size": WORDS, "layers": 1, "width": 16, "heads": 2}
    if kind == "coca":
        decoder = {"context_length": LENGTH, "vocab_size": WORDS, "layers": 1, "width": 16, "heads": 2}
        poolers = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
        text |= {"embed_cls": True, "output_tokens": True}
        model = open_clip.CoCa(16, decoder | {"mlp_ratio": 2}, text, vision | poolers)
        for parameter in model.parameters():  # it leaves some as they are in memory
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    else:
        model = open_clip.CLIP(16, vision, text, init_logit_bias=-10.0 if kind == "siglip" else None, output_dict=True)
    return model.double()


def arguments(kind, accumulate):
    return types.SimpleNamespace(
        model="coca" if kind == "coca" else "clip",
        siglip=kind == "siglip",
        distill=kind == "distill",
        loss_dist_impl=None,
        coca_caption_loss_weight=2.0,
        coca_contrastive_loss_weight=1.0,
        local_loss=False,
        gather_with_grad=False,
        horovod=False,
        rank=0,
        world_size=1,
        device="cpu",
        precision="fp64",
        accum_freq=accumulate,
        skip_scheduler=True,
        grad_clip_norm=1.0,
        log_every_n_steps=100,
        batch_size=BATCH,
        wandb=False,
        local_rank=0,
    )


class Recorded(torch.nn.Module):
    """A loss that keeps its values."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss
        self.curve = []

    def forward(self, **given):
        found = self.loss(**given)
        self.curve.append([float(value.detach()) for value in found.values()])
        return found


def trained(kind, accumulate):
    """Return the curve and the weights after an epoch."""
    options = arguments(kind, accumulate)
    loss = Recorded(open_clip.create_loss(options))
    model, teacher = model_of(0, kind), model_of(1, kind) if kind == "distill" else None
    generator = torch.Generator().manual_seed(0)
    loader = Loader()
    for _ in range(STEPS):
        words = torch.randint(1, WORDS, (BATCH, LENGTH), generator=generator)
        loader.append((torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64), words))
    data = {"train": types.SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    training.train_one_epoch(model, data, loss, 0, optimizer, None, None, teacher, options)
    return torch.tensor(loss.curve, dtype=torch.float64), torch.nn.utils.parameters_to_vector(model.parameters())


@pytest.mark.parametrize("largest", [0, _small._largest], ids=["sweep", "formula"])
@pytest.mark.parametrize(
    ("kind", "accumulate"), [("clip", 1), ("clip", 2), ("siglip", 1), ("siglip", 2), ("distill", 1), ("coca", 1)]
)
def test_an_epoch(kind, accumulate, largest):
    """The losses of twenty steps to 1e-12, and the weights that they lead to."""
    expected, weights = trained(kind, accumulate)
    with patch_open_clip(), _small.largest(largest):
        assert open_clip.create_loss is ours.create_loss
        found, ours_weights = trained(kind, accumulate)
    assert found.shape[0] == STEPS
    assert (found - expected).abs().max() <= 1e-12
    torch.testing.assert_close(ours_weights, weights, rtol=1e-9, atol=1e-9)
