"""Encoding in chunks: the gradients of the whole batch, the memory of a chunk, and what it cannot do exactly."""

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections import OrderedDict, UserDict
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import nn

import contrastive_kernels as ck
from benchmarks.measure import MIB, Step, peak_extra_mib
from tests.support.testing import ROOT

N, CHUNK, WIDTH, DIM = 22, 5, 16, 6


class Batch(UserDict):
    """A batch as Hugging Face's tokenizers return it."""

    def __getattr__(self, name):
        return self.data[name]


class Output(OrderedDict):
    """A model's output as Hugging Face's models return it."""

    def __getattr__(self, name):
        return self[name]


class Pair(NamedTuple):
    image: torch.Tensor
    text: torch.Tensor


class Text(nn.Module):
    """Tokens with a mask to embeddings: attention, and a mean over what is not masked."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(30, WIDTH)
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout, batch_first=True)
        self.head = nn.Linear(WIDTH, DIM)

    def forward(self, input_ids, attention_mask=None, return_dict=True):
        hidden = self.block(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        pooled = self.head((hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))
        return Output(last_hidden_state=hidden, pooled=pooled, attentions=None) if return_dict else pooled

    def of_batch(self, batch):
        return self(batch.input_ids, batch.attention_mask).pooled


class TwoTowers(nn.Module):
    """An image and a text tower in one module."""

    def __init__(self):
        super().__init__()
        self.image, self.text = mlp(), Text()

    def forward(self, pixels, tokens):
        return Pair(self.image(pixels), self.text(*tokens, return_dict=False))


def mlp(dropout=0.0):
    return nn.Sequential(nn.Linear(8, WIDTH), nn.Dropout(dropout), nn.GELU(), nn.Linear(WIDTH, DIM))


def frozen_below():
    tower = mlp()
    tower[0].requires_grad_(False)
    return tower


def pixels():
    return torch.randn(N, 8, requires_grad=True)


def tokens():
    lengths = torch.arange(N) % 4 + 1
    return {
        "input_ids": torch.randint(30, (N, 4)),
        "attention_mask": (torch.arange(4) < lengths[:, None]).float(),
        "return_dict": False,
    }


# An encoder, its inputs, and how the encoder takes them without chunks.
TOWERS = {
    "tensor": (mlp, pixels, lambda f, x: f(x)),
    "tuple": (mlp, lambda: (pixels(),), lambda f, x: f(*x)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Flatten(), nn.Linear(32, DIM)),
        lambda: torch.randn(N, 1, 4, 4), lambda f, x: f(x),
    ),
    "frozen part": (frozen_below, pixels, lambda f, x: f(x)),
    "BatchNorm in evaluation": (
        lambda: nn.Sequential(nn.Linear(8, DIM), nn.BatchNorm1d(DIM).eval()), pixels, lambda f, x: f(x)
    ),
    "function": (lambda: Text().of_batch, lambda: [Batch(tokens())], lambda f, x: f(*x)),
    "mapping": (Text, tokens, lambda f, x: f(**x)),
    "batch": (Text, lambda: Batch(tokens()), lambda f, x: f(**x)),
    "two towers": (
        TwoTowers, lambda: (pixels(), [tokens()["input_ids"], tokens()["attention_mask"]]), lambda f, x: f(*x)
    ),
}  # fmt: skip


def module_of(encoder):
    return getattr(encoder, "__self__", encoder)


def leaves(encoder, inputs):
    values = inputs if isinstance(inputs, tuple) else (inputs,)
    return [
        *(p for p in module_of(encoder).parameters() if p.requires_grad),
        *(x for x in values if isinstance(x, torch.Tensor) and x.requires_grad),
    ]


def gradients(embeddings, of):
    """Return the gradients of a loss in which all rows meet."""
    first, second = embeddings if isinstance(embeddings, tuple) else embeddings.chunk(2)
    return torch.autograd.grad(ck.nt_xent_loss(first, second, temperature=0.5), of)


def difference(found, expected):
    return max(((f - e).norm() / e.norm().clamp(min=1e-30)).item() for f, e in zip(found, expected, strict=True))


def made(name, dtype):
    make, inputs, call = TOWERS[name]
    encoder = make()
    module_of(encoder).to(dtype)
    inputs = inputs()

    def cast(x):
        if isinstance(x, torch.Tensor):
            return x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x
        if isinstance(x, (dict, Batch)):
            return type(x)({key: cast(value) for key, value in x.items()})
        return type(x)(map(cast, x)) if isinstance(x, (tuple, list)) else x

    return encoder, cast(inputs), call


@pytest.mark.parametrize("keep_last", [0, 1, 99])
@pytest.mark.parametrize("name", TOWERS)
def test_gradients_are_those_of_the_whole_batch(name, keep_last):
    encoder, inputs, call = made(name, torch.float64)
    of = leaves(encoder, inputs)
    whole = call(encoder, inputs)
    chunked = ck.encode_in_chunks(encoder, inputs, CHUNK, keep_last=keep_last)
    assert type(chunked) is type(whole)
    torch.testing.assert_close(chunked, whole)
    assert difference(gradients(chunked, of), gradients(whole, of)) < 1e-12


def test_output_keeps_its_class():
    encoder = Text()
    inputs = tokens() | {"return_dict": True}
    output = ck.encode_in_chunks(encoder, inputs, CHUNK)
    assert type(output) is Output and output.attentions is None
    assert output.last_hidden_state.shape == (N, 4, WIDTH)
    torch.testing.assert_close(output.pooled, encoder(**inputs).pooled)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep_last", [0, 2])
def test_dropout_is_that_of_the_chunks(keep_last, dtype):
    """Both forwards of a chunk draw the same; autocast is the same too."""
    encoder, x = mlp(dropout=0.5), torch.randn(N, 8)
    of = list(encoder.parameters())
    autocast = torch.autocast("cpu", dtype, cache_enabled=False) if dtype else nullcontext()
    with autocast:
        torch.manual_seed(1)
        expected = gradients(torch.cat([encoder(chunk) for chunk in x.split(CHUNK)]), of)
        torch.manual_seed(1)
        embeddings = ck.encode_in_chunks(encoder, x, CHUNK, keep_last=keep_last)
    torch.rand(3)
    found = gradients(embeddings, of)
    assert embeddings.dtype == (dtype or torch.float32)
    assert difference(found, expected) < 1e-6
    assert difference(found, gradients(ck.encode_in_chunks(encoder, x, CHUNK), of)) > 1e-2


def test_many_chunks_under_autocast_add_up_in_float32():
    """The error of 512 chunks is not larger than that of the whole batch."""
    encoder, x = mlp(), torch.randn(1024, 8)
    of = list(encoder.parameters())
    wide = copy.deepcopy(encoder).double()
    exact = gradients(wide(x.double()), list(wide.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        whole = gradients(encoder(x), of)
        many = gradients(ck.encode_in_chunks(encoder, x, 2), of)
        assert torch.is_autocast_cache_enabled()
    assert difference(many, exact) < 1.2 * difference(whole, exact) + 1e-3


@pytest.mark.parametrize("keep_last", [0, 2, 99])
def test_hooks_run_for_every_chunk(keep_last):
    """Those of the backward once, those of the forward again where the activations are not kept."""
    encoder, x, forward, backward = mlp(), torch.randn(N, 8), [], []
    encoder[0].register_forward_hook(lambda module, inputs, output: forward.append(len(output)))
    encoder[3].register_full_backward_hook(lambda module, grad_in, grad_out: backward.append(len(grad_out[0])))
    gradients(ck.encode_in_chunks(encoder, x, CHUNK, keep_last=keep_last), list(encoder.parameters()))
    assert sorted(backward) == [2, 5, 5, 5, 5]
    again = {0: [2, 5, 5, 5, 5], 2: [5, 5, 5], 99: []}[keep_last]
    assert sorted(forward) == sorted([2, 5, 5, 5, 5, *again])


def test_compiled_encoder():
    encoder, x = mlp().double(), torch.randn(N, 8, dtype=torch.float64)
    of = list(encoder.parameters())
    compiled = torch.compile(encoder, backend="aot_eager")
    assert difference(gradients(ck.encode_in_chunks(compiled, x, CHUNK), of), gradients(encoder(x), of)) < 1e-12


@pytest.mark.parametrize("form", ["around", "inside"])
def test_two_ranks(form, tmp_path):
    """DistributedDataParallel averages the gradients, step after step, with frozen parameters and several buckets."""
    command = [sys.executable, "-m", "tests.support.chunked_ddp", form, str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        errors = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(errors) == 3 and max(errors) < 1e-12


def test_without_gradients():
    encoder, x = mlp(), torch.randn(N, 8)
    with torch.no_grad():
        z = ck.encode_in_chunks(encoder, x, CHUNK)
    assert not z.requires_grad
    torch.testing.assert_close(z, encoder(x))
    assert not ck.encode_in_chunks(encoder.requires_grad_(False), x, CHUNK).requires_grad


@pytest.mark.parametrize("n", [0, 1, CHUNK, CHUNK + 1])
def test_few_rows(n):
    x = torch.randn(n, 8)
    encoder = mlp()
    torch.testing.assert_close(ck.encode_in_chunks(encoder, x, CHUNK), encoder(x))


def test_nan_stays_in_its_row():
    x = torch.randn(N, 8)
    x[7, 0] = torch.nan
    z = ck.encode_in_chunks(mlp(), x, CHUNK)
    assert z.isnan().any(1).nonzero().flatten().tolist() == [7]


def test_memory_is_that_of_a_chunk():
    """Beyond inputs and embeddings it does not grow with the rows; without chunks it does."""
    encoder = nn.Sequential(nn.Linear(16, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 8))

    def peak(n, encode):
        x = torch.randn(n, 16)
        backward = lambda loss: dict(enumerate(torch.autograd.grad(loss, list(encoder.parameters()))))  # noqa: E731
        return peak_extra_mib(Step(lambda: encode(x).square().mean(), backward), torch.device("cpu"))

    small, large = (peak(n, lambda x: ck.encode_in_chunks(encoder, x, 128)) for n in (2048, 16384))
    embeddings = (16384 - 2048) * 8 * 4 / MIB
    assert large - small < 6 * embeddings
    activations = 2048 * 512 * 4 / MIB
    assert peak(2048, encoder) > 4 * activations
    assert small < 2 * activations


BATCH_NORMS = {
    "module": lambda: nn.Sequential(nn.Linear(8, DIM), nn.Sequential(nn.BatchNorm1d(DIM))),
    "method": lambda: nn.Sequential(nn.Linear(8, DIM), nn.Sequential(nn.BatchNorm1d(DIM))).forward,
}


@pytest.mark.parametrize("make", BATCH_NORMS.values(), ids=BATCH_NORMS)
def test_batch_norm_is_named(make):
    encoder, x = make(), torch.randn(N, 8)
    with pytest.warns(UserWarning, match=r"'1\.0'") as caught:
        z = ck.encode_in_chunks(encoder, x, CHUNK)
    assert caught[0].filename == __file__
    z.sum().backward()
    assert module_of(encoder)[1][0].num_batches_tracked == 2 * 5
    with pytest.raises(ValueError, match=r"single row.*'1\.0'.*another chunk_size for 22 rows"):
        ck.encode_in_chunks(encoder, x, N - 1)
    module_of(encoder).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ck.encode_in_chunks(encoder, x, N - 1)


def test_module():
    """Its parameters are the encoder's, it takes what the encoder takes, and it is copied and pickled."""
    encoder = Text()
    module = ck.ChunkedEncoder(encoder, CHUNK, keep_last=1)
    inputs = tokens()
    expected = encoder(**inputs)
    torch.testing.assert_close(module(**inputs), expected)
    torch.testing.assert_close(module(inputs["input_ids"], inputs["attention_mask"], return_dict=False), expected)
    assert set(module.state_dict()) == {f"encoder.{name}" for name in encoder.state_dict()}
    assert "chunk_size=5, keep_last=1" in repr(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(twin(**inputs), expected)


X = torch.zeros(N, 8)
BAD = {
    "no rows in a chunk": (mlp(), X, {"chunk_size": 0}, ValueError, "chunk_size 0 must be at least 1"),
    "fraction": (mlp(), X, {"chunk_size": 2.5}, TypeError, "chunk_size must be an integer, not float"),
    "boolean": (mlp(), X, {"chunk_size": True}, TypeError, "chunk_size must be an integer, not bool"),
    "keep_last": (mlp(), X, {"keep_last": -1}, ValueError, "keep_last -1 must be at least 0"),
    "lengths": (torch.add, (X, X[1:]), {}, ValueError, r"\(22, 8\), \(21, 8\) must have the same number of rows"),
    "no tensor": (mlp(), {"x": None}, {}, TypeError, "inputs: no tensor"),
    "set": (mlp(), ({1},), {}, TypeError, "inputs: set is neither"),
    "returns a number": (lambda x: 1.0, X, {}, TypeError, "what the encoder returns: no tensor"),
    "returns nothing": (lambda x: None, X, {}, TypeError, "what the encoder returns: no tensor"),
    "returns an array": (lambda x: x.numpy(), X, {}, TypeError, "what the encoder returns: ndarray is neither"),
    "returns a scalar": (lambda x: (x, x.sum()), X, {}, ValueError, "the same number of rows"),
    "returns fewer rows": (lambda x: x[1:], X, {}, ValueError, "returned 4 rows for 5"),
}


@pytest.mark.parametrize(("encoder", "inputs", "options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(encoder, inputs, options, error, message):
    """An error comes before the second chunk."""
    calls = []

    def counted(*args, **named):
        calls.append(args)
        return encoder(*args, **named)

    with pytest.raises(error, match=message):
        ck.encode_in_chunks(counted, inputs, **{"chunk_size": CHUNK, **options})
    assert len(calls) <= 1
