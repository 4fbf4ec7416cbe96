"""Train a small sentence encoder on pairs of sentences, with the losses of sentence-transformers and with ours.

``python -m examples.compat.sentence_pairs`` needs sentence-transformers and no network: the transformer is random, its
words are those of the sentences. What changes is one import:

    from sentence_transformers.sentence_transformer import losses
    from contrastive_kernels.compat import sentence_transformers as losses
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from functools import partial
from types import ModuleType

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as original
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from contrastive_kernels.compat import sentence_transformers as ours
from examples.compat._curves import side_by_side

COLOURS = ["red", "blue", "green", "yellow", "black", "white", "brown", "grey"]
THINGS = ["house", "car", "tree", "door", "river", "stone", "bird", "ship", "lamp", "book", "coat", "bridge"]
PLACES = ["north", "south", "east", "west", "left", "right", "front", "back"]
PAIRS = [
    (f"where is the {colour} {thing}", f"you find this {thing} of {colour} colour in the {place}")
    for (colour, thing), place in zip(itertools.product(COLOURS, THINGS), itertools.cycle(PLACES))
]


def make_model() -> SentenceTransformer:
    """Return an encoder of two layers with random weights."""
    words = sorted({word for pair in PAIRS for sentence in pair for word in sentence.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config).save_pretrained(folder)
        special = dict(pad_token="[PAD]", unk_token="[UNK]")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
        transformer = Transformer(folder)
    return SentenceTransformer(modules=[transformer, Pooling(config.hidden_size)], device="cpu")


def train(losses: ModuleType, cached: bool, steps: int, batch_size: int) -> list[float]:
    """Return the losses of every step of a training."""
    model = make_model()
    if cached:
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=16)
    else:
        loss = losses.MultipleNegativesRankingLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model.train()
    curve = []
    for _ in range(steps):
        batch = [PAIRS[i] for i in torch.randperm(len(PAIRS))[:batch_size]]
        columns = [model.preprocess(list(sentences)) for sentences in zip(*batch, strict=True)]
        value = loss(columns, None)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        curve.append(value.item())
    return curve


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train with every loss, print the curves, and return the largest difference of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args(arguments)
    disable_progress_bar()  # of saving and loading a few weights
    differences = {}
    for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        cached = name.startswith("Cached")
        training = partial(train, cached=cached, steps=options.steps, batch_size=options.batch_size)
        differences[name] = side_by_side(name, training, original, ours)
    return differences


if __name__ == "__main__":
    main()
