"""What the cases of pytorch-metric-learning do not say: errors, dtypes, records, state, and ranks."""

import copy
import importlib
import itertools
import pickle

import pytest
import torch

from contrastive_kernels.compat import _peer, _small
from contrastive_kernels.compat.check.case import TOLERANCE, Draw, difference
from tests.support import adapters

adapters.require_peers()
pytestmark = pytest.mark.peers

NAMES = ("NTXentLoss", "SupConLoss")


def both():
    return adapters.modules("pytorch_metric_learning")


def made(kind, name, **options):
    return getattr(importlib.import_module(f"pytorch_metric_learning.{kind}"), name)(**options)


def random_rows(n=8, dtype=torch.float64, seed=0):
    return Draw(n, seed, dtype).rows(n, 5, grad=False)


def random_labels(n=8, classes=3):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(1))


def value_and_gradient(loss, rows, *arguments, **options):
    rows = rows.detach().clone().requires_grad_()
    value = loss(rows, *arguments, **options)
    value.backward()
    return {"value": value.detach(), "gradient": rows.grad}


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(_peer, "_warned", set())


@pytest.mark.parametrize("name", [*NAMES, "CrossBatchMemory"])
def test_is_the_peers(name):
    ours, theirs = both()
    arguments = [(module.NTXentLoss(), 5, 20) if name == "CrossBatchMemory" else () for module in (ours, theirs)]
    loss, peer = (getattr(module, name)(*given) for module, given in zip(both(), arguments, strict=True))
    assert isinstance(loss, getattr(theirs, name))
    assert type(loss).__name__ == name
    assert loss._record_these == peer._record_these
    assert {k: v.shape for k, v in loss.state_dict().items()} == {k: v.shape for k, v in peer.state_dict().items()}
    assert ours.TripletMarginLoss is theirs.TripletMarginLoss


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("largest", [0, _small._largest])
def test_labels_of_any_dtype(name, dtype, largest):
    labels, others = random_labels().to(dtype), random_labels(5).to(dtype)
    found = []
    for module in both():
        loss = getattr(module, name)()
        with _small.largest(largest):
            found.append(
                [
                    value_and_gradient(loss, random_rows(), labels),
                    value_and_gradient(loss, random_rows(), labels, ref_emb=random_rows(5, seed=2), ref_labels=others),
                    # labels of two dtypes are compared by value
                    value_and_gradient(
                        loss, random_rows(), labels, ref_emb=random_rows(5, seed=2), ref_labels=others.double()
                    ),
                ]
            )
    assert all(difference(a, b) <= TOLERANCE for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("largest", [0, _small._largest])
@pytest.mark.parametrize("name", NAMES)
def test_hardly_any_pairs(name, largest):
    """At most one pair of each kind: the library's zero, which has a gradient. One more pair: a loss."""
    row, references = random_rows(1), random_rows(3, seed=2)
    for labels in ([0, 1], [0, 0, 1], [0, 0], [1, 1], [0, 1, 1]):
        found = []
        for module in both():
            loss = getattr(module, name)()
            given = dict(ref_emb=references[: len(labels)], ref_labels=torch.tensor(labels))
            with _small.largest(largest):
                found.append(value_and_gradient(loss, row, torch.tensor([0]), **given))
        assert difference(*found) <= TOLERANCE
        assert bool(found[0]["value"] == 0) == (len(labels) == 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "arguments",
    [
        (random_rows(), None),
        (random_rows(), random_labels(7)),
        (random_rows(), random_labels()[:, None]),
        (random_rows().view(4, 2, 5), random_labels(4)),
        (random_rows(), random_labels(), None, random_rows(6), random_labels(5)),
        (random_rows(), random_labels(), None, random_rows(6)[:, :4], random_labels(6)),
        (random_rows(), random_labels(), None, random_rows(6).float(), random_labels(6)),
        (random_rows(), random_labels(), None, random_rows(3)),
    ],
)
def test_refuses(name, arguments):
    errors = []
    for module in both():
        with pytest.raises(Exception) as raised:  # noqa: PT011, compared below
            getattr(module, name)()(*arguments)
        errors.append(raised.type)
    assert errors[0] is errors[1]


def test_more_references_than_labels():
    """Only the first of them have labels, the anchors'."""
    ours, theirs = (
        value_and_gradient(m.NTXentLoss(), random_rows(), random_labels(), ref_emb=random_rows(9)) for m in both()
    )
    assert difference(ours, theirs) == 0


@pytest.mark.parametrize("name", NAMES)
def test_empty_batch(name):
    none = torch.zeros(0, dtype=torch.int64)
    assert [getattr(module, name)()(random_rows()[:0], none).item() for module in both()] == [0, 0]


def test_memory_refuses():
    for module in both():
        memory = module.CrossBatchMemory(module.NTXentLoss(), 5, 6)
        with pytest.raises(AssertionError):
            memory(random_rows(), random_labels())
        pairs, mask = ([0], [1], [0], [2]), torch.ones(4, dtype=torch.bool)
        with pytest.raises(ValueError, match="mutually exclusive"):
            memory(random_rows(4), random_labels(4), pairs, mask)
        with pytest.raises(Exception, match="not supported"):
            module.CrossBatchMemory(module.ArcFaceLoss(3, 5), 5)


@pytest.mark.parametrize(
    ("match", "name", "options"),
    [
        ("LpDistance", "NTXentLoss", lambda: dict(distance=made("distances", "LpDistance"))),
        ("SNRDistance", "SupConLoss", lambda: dict(distance=made("distances", "SNRDistance"))),
        ("p, power", "SupConLoss", lambda: dict(distance=made("distances", "CosineSimilarity", power=2))),
        ("p, power", "NTXentLoss", lambda: dict(distance=made("distances", "CosineSimilarity", p=1))),
        ("distance", "SupConLoss", lambda: dict(distance=made("distances", "CosineSimilarity", collect_stats=True))),
        ("collect_stats", "NTXentLoss", lambda: dict(reducer=made("reducers", "MeanReducer", collect_stats=True))),
        ("ThresholdReducer", "NTXentLoss", lambda: dict(reducer=made("reducers", "ThresholdReducer", low=0.1))),
        ("AvgNonZeroReducer", "NTXentLoss", lambda: dict(
            reducer=made("reducers", "AvgNonZeroReducer"),
            embedding_regularizer=made("regularizers", "LpRegularizer"),
        )),
    ],
)  # fmt: skip
def test_dense_warns_once(match, name, options, unwarned, recwarn):
    losses = [getattr(module, name)(**options()) for module in both()]
    with pytest.warns(UserWarning, match=match):
        ours = value_and_gradient(losses[0], random_rows(), random_labels())
    assert difference(ours, value_and_gradient(losses[1], random_rows(), random_labels())) == 0
    recwarn.clear()
    losses[0](random_rows(), random_labels())
    assert not recwarn.list


@pytest.mark.parametrize("name", NAMES)
def test_miners_pairs_warn(name, unwarned):
    pairs = made("miners", "BatchEasyHardMiner")(random_rows(), random_labels())
    with pytest.warns(UserWarning, match="indices_tuple"):
        ours = value_and_gradient(getattr(both()[0], name)(), random_rows(), random_labels(), pairs)
    assert difference(ours, value_and_gradient(getattr(both()[1], name)(), random_rows(), random_labels(), pairs)) == 0


@pytest.mark.parametrize("option", ["miner", "indices_tuple", "enqueue_mask", "a loss"])
def test_memory_dense_warns(option, unwarned):
    found = []
    for module in both():
        loss = (module.ContrastiveLoss if option == "a loss" else module.NTXentLoss)()
        miner = made("miners", "MultiSimilarityMiner") if option == "miner" else None
        memory = module.CrossBatchMemory(loss, 5, 20, miner=miner)
        given = {
            "indices_tuple": (torch.tensor([0]), torch.tensor([1]), torch.tensor([0]), torch.tensor([2])),
            "enqueue_mask": torch.arange(8) % 3 > 0,
        }
        steps = [random_rows(seed=seed) for seed in range(3)]
        chosen = {option: given[option]} if option in given else {}
        if module is both()[0]:
            with pytest.warns(UserWarning, match=option):
                found.append([value_and_gradient(memory, rows, random_labels(), **chosen) for rows in steps])
        else:
            found.append([value_and_gradient(memory, rows, random_labels(), **chosen) for rows in steps])
    assert all(difference(a, b) <= TOLERANCE for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("method", ["_compute_loss", "pair_based_loss"])
def test_what_a_subclass_changes_counts(method, unwarned):
    found = []
    for module in both():

        def twice(self, *arguments, peer=module.NTXentLoss):
            found = getattr(peer, method)(self, *arguments)
            return {name: part | {"losses": 2 * part["losses"]} for name, part in found.items()}

        loss = type("NTXentLoss", (module.NTXentLoss,), {method: twice})()
        found.append(value_and_gradient(loss, random_rows(), random_labels()))
    assert difference(*found) <= TOLERANCE


@pytest.mark.parametrize("method", ["forward", "compute_loss", "create_indices_tuple"])
def test_what_a_subclass_changes_counts_in_a_memory(method, unwarned):
    found = []
    for module in both():
        memory_class, loss_class = module.CrossBatchMemory, module.NTXentLoss
        seen = []

        def watched(self, *arguments, peer=memory_class if method == "create_indices_tuple" else loss_class, seen=seen):
            seen.append(len(arguments[2] if method != "create_indices_tuple" else arguments))
            return getattr(peer, method)(self, *arguments)

        if method == "create_indices_tuple":
            memory_class = type("Memory", (memory_class,), {method: watched})
        else:
            loss_class = type("NTXentLoss", (loss_class,), {method: watched})
        found.append(value_and_gradient(memory_class(loss_class(), 5, 20), random_rows(), random_labels()))
        assert seen == [6 if method == "create_indices_tuple" else 4]
    assert difference(*found) <= TOLERANCE


@pytest.mark.parametrize("largest", [0, _small._largest])
def test_losses_below_rounding(largest):
    """The default reducer leaves out the losses that are 0 after rounding; some are far below the others, not all."""
    rows = random_rows(40)
    views = torch.cat([rows, rows + 0.1 * rows.roll(1, 0)])
    labels = torch.arange(40).repeat(2)
    for temperature in (0.01, 0.005):
        found = []
        for module in both():
            loss = module.SupConLoss(temperature)
            with _small.largest(largest):
                found.append(value_and_gradient(loss, views, labels))
                with torch.no_grad():
                    dictionary = loss.compute_loss(views, labels, None, views, labels)
                found[-1]["number"] = (dictionary["loss"]["losses"] > 0).sum()
        assert 0 < int(found[1]["number"]) < len(views)
        assert difference(*found) <= TOLERANCE


def test_records():
    """Of a reducer, which sees the loss of every anchor of SupCon; of the distance by the library's own code."""
    found = []
    for module in both():
        reducer = made("reducers", "AvgNonZeroReducer", collect_stats=True)
        loss = module.SupConLoss(reducer=reducer, distance=made("distances", "CosineSimilarity"))
        loss(random_rows(), random_labels())
        distance = made("distances", "CosineSimilarity", collect_stats=True)
        module.NTXentLoss(distance=distance)(random_rows(), random_labels())
        found.append((loss.reducer.losses_size, loss.reducer.num_past_filter, distance.initial_avg_query_norm))
    assert found[0] == found[1]
    assert found[0][1] > 0


@pytest.mark.parametrize("name", NAMES)
def test_attributes_are_read_at_every_call(name):
    found = []
    for module in both():
        loss = getattr(module, name)()
        loss.temperature = 0.5
        loss.distance = made("distances", "DotProductSimilarity")
        first = value_and_gradient(loss, random_rows(), random_labels())
        loss.distance.normalize_embeddings = False
        found.append(
            {**first, **{f"{k} 2": v for k, v in value_and_gradient(loss, random_rows(), random_labels()).items()}}
        )
    assert difference(*found) <= TOLERANCE


def test_do_nothing_reducer():
    """What the loss gives to a reducer: one number per anchor."""
    ours, theirs = (
        m.SupConLoss(reducer=made("reducers", "DoNothingReducer"))(random_rows(), random_labels()) for m in both()
    )
    assert ours["loss"]["reduction_type"] == theirs["loss"]["reduction_type"]
    assert torch.equal(ours["loss"]["indices"], theirs["loss"]["indices"])
    assert difference({"losses": ours["loss"]["losses"]}, {"losses": theirs["loss"]["losses"]}) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, dtype):
    rows, labels = random_rows(40, dtype), random_labels(40, 10)
    expected = value_and_gradient(getattr(both()[1], name)(), rows.double(), labels)
    found = value_and_gradient(getattr(both()[0], name)(), rows, labels)
    assert found["value"].dtype == torch.float32
    assert found["value"].item() == pytest.approx(expected["value"].item(), rel=2e-2)
    assert (found["gradient"].double() - expected["gradient"]).norm() < 5e-2 * expected["gradient"].norm()


@pytest.mark.parametrize("largest", [0, _small._largest])
def test_no_cap_in_float32(largest):
    """The peer's float32 logarithm of the smallest number ends at 87.3."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 1e-3], [1.0, -1e-3]])
    labels = torch.tensor([0, 0, 1, 1])
    ours, theirs = (value_and_gradient(m.NTXentLoss(temperature=0.01), rows, labels)["value"] for m in both())
    exact = value_and_gradient(both()[1].NTXentLoss(temperature=0.01), rows.double(), labels)["value"]
    with _small.largest(largest):
        assert value_and_gradient(both()[0].NTXentLoss(temperature=0.01), rows, labels)[
            "value"
        ].item() == pytest.approx(exact.item(), rel=1e-5)
    assert ours > theirs + 10


@pytest.mark.parametrize("largest", [0, _small._largest])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_zeros(name, largest):
    rows = random_rows()
    rows[3] = 0
    with _small.largest(largest):
        ours = value_and_gradient(getattr(both()[0], name)(), rows, random_labels())
    theirs = value_and_gradient(getattr(both()[1], name)(), rows, random_labels())
    assert theirs["gradient"][3].abs().max() > 1e3
    theirs["gradient"][3] = 0
    assert difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_memory_state(name):
    """Either loads what the other saved, on and on."""
    ours, theirs = (module.CrossBatchMemory(getattr(module, name)(), 5, 20) for module in both())
    for step in range(3):
        rows, labels = random_rows(seed=step), random_labels()
        found = [value_and_gradient(memory, rows, labels) for memory in (ours, theirs)]
        assert difference(*found) <= TOLERANCE
        assert difference(ours.state_dict(), theirs.state_dict()) == 0
        assert (ours.queue_idx, ours.has_been_filled) == (theirs.queue_idx, theirs.has_been_filled)
        saved = ours.state_dict(), theirs.state_dict()
        theirs.load_state_dict(saved[0])
        ours.load_state_dict(saved[1])
    ours.reset_queue()
    assert not ours.embedding_memory.any()


def test_memory_copies():
    memory = both()[0].CrossBatchMemory(both()[0].SupConLoss(), 5, 20)
    memory(random_rows(), random_labels())
    copies = copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))
    expected = memory(random_rows(seed=1), random_labels())
    assert all(torch.equal(other(random_rows(seed=1), random_labels()), expected) for other in copies)


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        for name in NAMES:
            rows = random_rows(40, torch.float32)
            ours, theirs = (getattr(m, name)()(rows, random_labels(40, 10)) for m in both())
            assert ours.dtype == torch.float32
            assert ours.item() == pytest.approx(theirs.item(), rel=2e-2)


def on_a_rank(group, largest):
    """Return how far adapter and peer are apart in the wrapper that gathers the rows of all ranks."""
    labels = random_labels(6)
    wrapper = importlib.import_module("pytorch_metric_learning.utils.distributed").DistributedLossWrapper
    rank = torch.distributed.get_rank()
    worst = 0.0
    for name, efficient in itertools.product((*NAMES, "CrossBatchMemory"), (False, True)):
        if name == "CrossBatchMemory" and efficient:
            continue  # refused by the wrapper
        found = []
        for module in both():
            loss = module.CrossBatchMemory(module.SupConLoss(), 5, 30) if "Memory" in name else getattr(module, name)()
            loss = wrapper(loss, efficient=efficient)
            with _small.largest(largest):
                steps = [value_and_gradient(loss, random_rows(6, seed=7 * rank + step), labels) for step in (0, 1)]
            found.append({f"{key} {i}": x for i, step in enumerate(steps) for key, x in step.items()})
        worst = max(worst, difference(*found))
    return worst


@pytest.mark.parametrize("largest", [0, _small._largest])
def test_ranks(ranks, largest):
    assert max(ranks.run(3, on_a_rank, largest)) <= TOLERANCE
