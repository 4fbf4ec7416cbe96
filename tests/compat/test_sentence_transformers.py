"""What the cases of sentence-transformers do not say: errors, dtypes, ranks, wrappers, and the cache."""

import copy
import importlib.util
import itertools
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from contrastive_kernels.compat import _peer, _small
from contrastive_kernels.compat.check.case import TOLERANCE, Draw, difference
from contrastive_kernels.compat.check.sentence_transformers import DIRECTIONS, HARDNESS, Rows
from tests.support import adapters

adapters.require_peers()
pytestmark = pytest.mark.peers

PLAIN, CACHED = "MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"
SYMMETRIC, CACHED_SYMMETRIC = "MultipleNegativesSymmetricRankingLoss", "CachedMultipleNegativesSymmetricRankingLoss"
BOTH = ("query_to_doc", "doc_to_query")
OPTIONS = [
    dict(),
    dict(directions=DIRECTIONS),
    dict(directions=BOTH, partition_mode="per_direction"),
    *[dict(directions=DIRECTIONS, hardness_mode=mode, hardness_strength=5.0) for mode in HARDNESS],
]


def both():
    return adapters.modules("sentence_transformers")


def value(loss, columns):
    """Return the loss of columns of rows, as its own part of a training step computes it."""
    if hasattr(loss, "calculate_loss"):
        return loss.calculate_loss([list(column.split(2)) for column in columns])
    return loss.compute_loss_from_embeddings(columns, None)


def value_and_gradients(loss, columns):
    columns = [column.detach().clone().requires_grad_() for column in columns]
    found = value(loss, columns)
    found.backward()
    return {"value": found.detach(), **{str(i): column.grad for i, column in enumerate(columns)}}


def random_columns(count=3, n=6, dtype=torch.float64):
    draw = Draw(n, dtype=dtype)
    return [draw.rows(n, 5, grad=False) for _ in range(count)]


@pytest.mark.parametrize("name", [PLAIN, CACHED, SYMMETRIC, CACHED_SYMMETRIC])
def test_is_the_peers(name):
    ours, theirs = both()
    loss = getattr(ours, name)(Rows(), scale=4.0)
    peer = getattr(theirs, name)(Rows(), scale=4.0)
    assert isinstance(loss, getattr(theirs, name))
    assert isinstance(loss, getattr(ours, name.replace("Symmetric", "")))
    assert type(loss).__name__ == name
    assert loss.get_config_dict() == peer.get_config_dict()
    assert loss.temperature == 0.25
    assert loss.citation == peer.citation
    assert ours.GISTEmbedLoss is theirs.GISTEmbedLoss


@pytest.mark.parametrize("name", [PLAIN, CACHED])
def test_copies(name):
    loss = getattr(both()[0], name)(Rows(), scale=3.0)
    columns = random_columns()
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(value(other, columns), value(loss, columns))


@pytest.mark.parametrize("name", [PLAIN, CACHED])
@pytest.mark.parametrize(
    "options",
    [
        dict(scale=0),
        dict(scale=-1.0),
        dict(directions=()),
        dict(directions=("query_to_query",)),
        dict(directions=("query_to_doc", "up")),
        dict(partition_mode="both"),
        dict(partition_mode="per_direction", directions=DIRECTIONS),
        dict(hardness_mode="soft"),
        dict(hardness_strength=-1.0),
    ],
)
def test_refuses_options(name, options):
    for module in both():
        with pytest.raises(ValueError):  # noqa: PT011, the text is the peer's
            getattr(module, name)(Rows(), **options)


@pytest.mark.parametrize("columns", [random_columns(1), [torch.randn(4, 5), torch.randn(4, 3)], [torch.randn(5)] * 2])
def test_refuses_embeddings(columns):
    """What the peer refuses, by the same type; what it takes, with the same value."""
    ours, theirs = (getattr(module, PLAIN)(Rows()) for module in both())
    try:
        expected = value(theirs, columns)
    except Exception as error:
        with pytest.raises(type(error)):
            value(ours, columns)
    else:
        assert torch.equal(value(ours, columns), expected)


@pytest.mark.parametrize("largest", [0, _small._largest])
@pytest.mark.parametrize("kind", [np.float32, np.int64, lambda x: torch.tensor([x], dtype=torch.float32)])
@pytest.mark.parametrize("options", OPTIONS)
def test_numbers_of_any_kind(options, kind, largest):
    """A factor of less precision than the embeddings loses nothing more."""
    strength = options.get("hardness_strength", 0.0)
    options = options | {"scale": kind(14), "hardness_strength": np.float32(strength)}
    with _small.largest(largest):
        found = [value_and_gradients(getattr(module, PLAIN)(Rows(), **options), random_columns()) for module in both()]
    assert difference(*found) <= TOLERANCE


def test_empty_batch():
    assert all(getattr(module, PLAIN)(Rows())([{"rows": torch.ones(0, 4)}] * 2, None).isnan() for module in both())


@pytest.mark.parametrize("name", [SYMMETRIC, CACHED_SYMMETRIC])
def test_deprecated(name):
    for module in both():
        with pytest.warns(DeprecationWarning, match=f"{name} is deprecated"):
            getattr(module, name)(Rows())


def test_import_does_not_warn(monkeypatch):
    spec = importlib.util.spec_from_file_location("imported_again", both()[0].__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec.loader.exec_module(module)


@pytest.mark.parametrize("largest", [0, _small._largest])
@pytest.mark.parametrize("name", [PLAIN, CACHED])
def test_attributes_are_read_at_every_call(name, largest):
    """Also a scale that is trained, and hardness, whose penalty has no gradient but by the scale."""
    columns = random_columns()
    found = []
    for module in both():
        loss = getattr(module, name)(Rows())
        scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        loss.scale, loss.directions = scale, list(BOTH)
        loss.hardness_mode, loss.hardness_strength = "in_batch_negatives", 2.0
        with _small.largest(largest):
            found.append({**value_and_gradients(loss, columns), "scale": scale.grad})
    assert difference(*found) <= TOLERANCE


@pytest.mark.parametrize("name", [PLAIN, CACHED])
def test_dense_warns(name, monkeypatch):
    monkeypatch.setattr(_peer, "_warned", set())
    ours, theirs = both()
    columns = random_columns()
    options = dict(similarity_fct=lambda a, b: -torch.cdist(a, b))
    with pytest.warns(UserWarning, match="similarity_fct"):
        found = value(getattr(ours, name)(Rows(), **options), columns)
    assert torch.equal(found, value(getattr(theirs, name)(Rows(), **options), columns))
    # the constructor refuses it, the call does not
    losses = [getattr(module, name)(Rows(), directions=DIRECTIONS) for module in both()]
    for loss in losses:
        loss.partition_mode = "per_direction"
    with pytest.warns(UserWarning, match="per_direction"):
        found = value(losses[0], columns)
    assert torch.equal(found, value(losses[1], columns))


def test_sparse_embeddings_are_the_peers(monkeypatch):
    """Which have no rows by number on a CPU."""
    monkeypatch.setattr(_peer, "_warned", set())
    sparse = [column.relu().to_sparse() for column in random_columns()]
    with pytest.warns(UserWarning, match="sparse"), pytest.raises(NotImplementedError):
        value(getattr(both()[0], PLAIN)(Rows()), sparse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_half_precision(dtype, options):
    """A float32 loss, of the same rows in float32; gradients in the dtype of the rows."""
    columns = random_columns(n=40, dtype=dtype)
    ours, theirs = both()
    expected = value_and_gradients(getattr(theirs, PLAIN)(Rows(), **options), [c.double() for c in columns])
    for largest in (0, _small._largest):
        with _small.largest(largest):
            found = value_and_gradients(getattr(ours, PLAIN)(Rows(), **options), columns)
        assert found["value"].dtype == torch.float32
        assert found["value"].item() == pytest.approx(expected["value"].item(), rel=1e-5)
        for name in ("0", "1", "2"):
            assert found[name].dtype == dtype
            error = (found[name].double() - expected[name]).abs().max() / expected[name].abs().max()
            assert error < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [PLAIN, CACHED])
def test_autocast(name, dtype):
    columns = random_columns(n=40, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        ours, theirs = (value_and_gradients(getattr(m, name)(Rows(), directions=DIRECTIONS), columns) for m in both())
    assert ours["value"].dtype == theirs["value"].dtype
    assert ours["value"].item() == pytest.approx(theirs["value"].item(), rel=2e-2)


@pytest.mark.parametrize("largest", [0, _small._largest])
@pytest.mark.parametrize("options", OPTIONS)
def test_rows_of_zeros(options, largest):
    """Their gradient is 0; the peer's is 1e12 times that of a unit row."""
    columns = random_columns()
    for column in columns:
        column[1] = 0
    ours, theirs = both()
    with _small.largest(largest):
        found = value_and_gradients(getattr(ours, PLAIN)(Rows(), **options), columns)
    expected = value_and_gradients(getattr(theirs, PLAIN)(Rows(), **options), columns)
    for i, _ in enumerate(columns):
        assert expected[str(i)][1].abs().max() > 1e3
        expected[str(i)][1] = 0
    assert difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("options", OPTIONS)
def test_compiles(options):
    loss = getattr(both()[0], PLAIN)(Rows(), **options)
    compiled = torch.compile(loss.compute_loss_from_embeddings, fullgraph=True, backend="aot_eager")
    columns = random_columns()
    assert compiled(columns, None).item() == pytest.approx(value(loss, columns).item(), abs=1e-12)


@pytest.mark.parametrize("name", [PLAIN, CACHED])
def test_no_gradient(name):
    with torch.no_grad():
        columns = [{"rows": column} for column in random_columns()]
        ours, theirs = (getattr(module, name)(Rows())(columns, None) for module in both())
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    assert not ours.requires_grad


def test_cached_backward():
    """The loss comes back detached, every part of every column with its gradient, whatever the mini-batches are."""
    columns = random_columns(n=9)
    expected = value_and_gradients(getattr(both()[0], PLAIN)(Rows()), columns)
    for size in (1, 4, 9):
        parts = [[part.clone().requires_grad_() for part in column.split(size)] for column in columns]
        loss = getattr(both()[0], CACHED)(Rows(), mini_batch_size=2).calculate_loss(parts, with_backward=True)
        assert not loss.requires_grad
        found = {str(i): torch.cat([part.grad for part in column]) for i, column in enumerate(parts)}
        assert difference({"value": loss, **found}, expected) <= TOLERANCE


class Layer(nn.Module):
    """An encoder of one layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 8, dtype=torch.float64)

    def __getitem__(self, index):
        return self

    def get_embedding_dimension(self):
        return 8

    def forward(self, features):
        return {"sentence_embedding": self.layer(features["rows"])}


@pytest.mark.parametrize("name", [PLAIN, CACHED])
def test_matryoshka(name):
    found = []
    for module in both():
        model = Layer()
        loss = module.MatryoshkaLoss(model, getattr(module, name)(model), matryoshka_dims=[8, 4])
        result = loss([{"rows": column} for column in random_columns()], None)
        result.backward()
        found.append({"value": result.detach(), "weight": model.layer.weight.grad, "bias": model.layer.bias.grad})
    assert difference(*found) <= TOLERANCE


@pytest.mark.parametrize("name", [PLAIN, CACHED])
@pytest.mark.parametrize("options", OPTIONS)
def test_gathering_is_that_of_the_peers_module(name, options, monkeypatch):
    """Who replaces the functions there gets what the replacements give: here rows of three ranks, in one process."""
    ours, theirs = both()
    before, after = random_columns(), random_columns()
    peers_module = {PLAIN: ours._plain, CACHED: ours._cached}[name]
    found = []
    for module, largest in ((theirs, 0), (ours, 0), (ours, _small._largest)):
        parts = itertools.cycle(zip(before, after, strict=True))

        def gather(x, parts=parts):
            first, last = next(parts)
            return torch.cat([first, x, last.flip(0)])

        monkeypatch.setattr(peers_module, "all_gather_with_grad", gather)
        monkeypatch.setattr(peers_module, "get_rank", lambda: 1)
        loss = getattr(module, name)(Rows(), gather_across_devices=True, **options)
        with _small.largest(largest):
            found.append(value_and_gradients(loss, [column + 1 for column in random_columns()]))
    assert difference(found[1], found[0]) <= TOLERANCE
    assert difference(found[2], found[0]) <= TOLERANCE


@pytest.mark.parametrize("options", OPTIONS)
def test_gathering_stores_no_matrix(options, monkeypatch):
    """Of the own rows with those of all ranks; there are three here."""
    n = 1100
    monkeypatch.setattr(both()[0]._plain, "all_gather_with_grad", lambda x: torch.cat([x.flip(0), x, 1 - x]))
    monkeypatch.setattr(both()[0]._plain, "get_rank", lambda: 1)
    columns = random_columns(n=n, dtype=torch.float32)
    with adapters.NoMatrix(n):
        value_and_gradients(getattr(both()[0], PLAIN)(Rows(), gather_across_devices=True, **options), columns)


def on_a_rank(group, largest):
    """Return how far adapter and peer are apart over real ranks, for every option of both classes."""
    ours, theirs = both()
    worst = 0.0
    for name, options in itertools.product((PLAIN, CACHED), OPTIONS):
        torch.manual_seed(torch.distributed.get_rank())
        columns = [torch.randn(4, 5, dtype=torch.float64) for _ in range(3)]
        with _small.largest(largest):
            found = [
                value_and_gradients(getattr(m, name)(Rows(), gather_across_devices=True, **options), columns)
                for m in (ours, theirs)
            ]
        worst = max(worst, difference(*found))
    return worst


@pytest.mark.parametrize("largest", [0, _small._largest])
def test_ranks(ranks, largest):
    assert max(ranks.run(3, on_a_rank, largest)) <= TOLERANCE
