"""open_clip's losses: what the cases of the self-test cannot say."""

import copy
import doctest
import pickle

import pytest
import torch

import python_ref
from contrastive_kernels.compat import _peer, _small
from contrastive_kernels.compat.check.case import TOLERANCE, difference
from tests.support import adapters
from tests.support.open_clip import CLASSES, inputs, made, open_clip, ours, result, theirs

pytestmark = pytest.mark.peers

PATHS = pytest.mark.parametrize("largest", [0, _small._largest], ids=["sweep", "formula"])


# What they are


@pytest.mark.parametrize("name", CLASSES)
def test_is_one_of_theirs(name):
    loss = made(ours, name)
    assert isinstance(loss, getattr(theirs, name))
    assert type(loss).__name__ == name
    if name != "SigLipLoss":
        assert isinstance(loss, ours.ClipLoss)
    for inherited in ("get_logits", "get_ground_truth"):
        assert getattr(type(loss), inherited) is getattr(getattr(theirs, name), inherited)
    peer = made(theirs, name)
    assert vars(loss).keys() == vars(peer).keys()


def test_call_parameters_are_theirs():
    for name in CLASSES:
        assert adapters.parameters(getattr(ours, name).forward) == adapters.parameters(getattr(theirs, name).forward)


@pytest.mark.parametrize("name", CLASSES)
def test_without_dictionary(name):
    """The value alone, or a pair, in the order of the dictionary."""
    found = [made(module, name)(**inputs(name)) for module in (ours, theirs)]
    assert isinstance(found[0], tuple) == isinstance(found[1], tuple) == (name in ("CoCaLoss", "DistillClipLoss"))
    torch.testing.assert_close(*found)


def test_logits_are_theirs():
    given = inputs("ClipLoss")
    for found, expected in zip(
        ours.ClipLoss().get_logits(**given, logit_bias=torch.tensor(1.0)),
        theirs.ClipLoss().get_logits(**given, logit_bias=torch.tensor(1.0)),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_other_names_are_forwarded():
    assert ours.CLIP is open_clip.CLIP
    assert ours.gather_features is theirs.gather_features
    for missing in ("no_such_name", "_private"):
        with pytest.raises(AttributeError, match=missing):
            getattr(ours, missing)


def test_examples_run():
    found = doctest.testmod(ours, extraglobs={"torch": torch, "open_clip": open_clip})
    assert found.attempted and not found.failed


# Values


@PATHS
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "kind",
    [
        float,
        int,
        lambda x: torch.tensor([x], dtype=torch.float64),
        lambda x: torch.tensor(x),
        lambda x: torch.tensor(5),
    ],
    ids=["float", "int", "one element", "0-dim float32", "0-dim int64"],
)
def test_scale_of_any_kind(name, kind, largest):
    given = inputs(name) | {"logit_scale": kind(5.0)}
    with _small.largest(largest):
        found = result(made(ours, name), given)
    assert difference(found, result(made(theirs, name), given)) <= TOLERANCE


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss", "DistillClipLoss"])
def test_several_scales(name):
    """Broadcast over the rows as open_clip's code does, by that code, which warns once."""
    _peer._warned.clear()
    given = inputs(name) | {"logit_scale": torch.linspace(1, 5, 9, dtype=torch.float64)[:, None].requires_grad_()}
    with _small.largest(0), pytest.warns(UserWarning, match=f"{name} with a scale or bias of several numbers stores"):
        found = result(made(ours, name), given)
    assert difference(found, result(made(theirs, name), given)) <= TOLERANCE


@PATHS
def test_agrees_with_the_reference(largest):
    """Ours and theirs might err together."""
    x, y, scale = (inputs("ClipLoss")[key] for key in ("image_features", "text_features", "logit_scale"))
    with _small.largest(largest):
        torch.testing.assert_close(ours.ClipLoss()(x, y, scale), python_ref.clip_loss(x, y, scale))
        bias = torch.tensor(-3.0, dtype=torch.float64)
        torch.testing.assert_close(ours.SigLipLoss()(x, y, scale, bias), python_ref.siglip_loss(x, y, scale, bias))


@PATHS
@pytest.mark.parametrize("name", ["DistillClipLoss", "SigLipLoss"])
def test_far_from_each_other(name, largest):
    """Large scales: no overflow, and no digits lost."""
    given = inputs(name) | {"logit_scale": 300.0}
    if name == "DistillClipLoss":
        given["dist_logit_scale"] = torch.tensor(500.0)
    with _small.largest(largest):
        found = result(made(ours, name), given)
    assert difference(found, result(made(theirs, name), given)) <= TOLERANCE


@PATHS
@pytest.mark.parametrize("negative_only", [False, True])
def test_siglip_value_may_be_added_to_in_place(negative_only, largest):
    given = inputs("SigLipLoss")
    with _small.largest(largest):
        found = {}
        for module in (ours, theirs):
            loss = module.SigLipLoss()._loss(**given, negative_only=negative_only)
            loss += module.SigLipLoss()._loss(**given, negative_only=True)
            loss += 1.0
            grads = torch.autograd.grad(loss, list(given.values()))
            found[module] = dict(enumerate([loss.detach(), *grads]))
    assert difference(found[ours], found[theirs]) <= TOLERANCE


@PATHS
@pytest.mark.parametrize("name", CLASSES)
def test_second_derivatives(name, largest):
    """The gradient of the squared gradient: the sum over the rows is no constant in any order."""
    found = {}
    for module in (ours, theirs):
        given = inputs(name)
        leaves = [x for x in given.values() if x.requires_grad]
        with _small.largest(largest):
            values = made(module, name)(**given, output_dict=True).values()
            first = torch.autograd.grad(sum(values), leaves, create_graph=True)
            second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
        found[module] = dict(enumerate(second))
    assert difference(found[ours], found[theirs]) <= TOLERANCE


@pytest.mark.parametrize("learning", ["image_features", "text_features", "logit_scale"])
def test_distillation_of_a_single_input(learning):
    given = {key: x.detach().requires_grad_(key == learning) for key, x in inputs("DistillClipLoss").items()}
    with _small.largest(0):
        found = result(made(ours, "DistillClipLoss"), given)
    assert difference(found, result(made(theirs, "DistillClipLoss"), given)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_half_precision(name, dtype):
    """A float32 loss, within the rounding of the gradients of the value of the same numbers in float64."""
    given = inputs(name, 40, dtype)
    found = result(made(ours, name), given)
    wide = {
        key: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for key, x in given.items()
    }
    expected = result(made(theirs, name), wide)
    for key, value in found.items():
        caption = key.startswith("caption") or "logits" in key
        if not key.startswith("gradient") and not caption:
            assert value.dtype == torch.float32
            assert abs(value - expected[key]) < 1e-5 * max(1, abs(expected[key])), key
        # one rounding of a gradient, a few of the caption's loss, which is the peer's
        bound = (8 if caption else 2) * torch.finfo(dtype).eps
        assert (value - expected[key]).abs().max() <= bound * expected[key].abs().max(), key


@pytest.mark.parametrize("name", CLASSES)
def test_autocast(name):
    """Rows are cast to autocast's dtype, as for every product; features may differ in dtype."""
    given = inputs(name, 40, torch.float32)
    mixed = given | {"text_features": given["text_features"].detach().bfloat16().requires_grad_()}
    expected = result(made(theirs, name), given)
    for chosen in (given, mixed):
        with torch.autocast("cpu", torch.bfloat16):
            found = result(made(ours, name), chosen)
        for key in ("contrastive_loss", "distill_loss"):
            if key in found:
                assert found[key].dtype == torch.float32
                assert abs(found[key] - expected[key]) < 0.02 * abs(expected[key])


def test_small_losses_have_their_digits():
    """In float32 the peer rounds a loss of 1e-9 to 0; so does the plain formula of small batches."""
    x = torch.eye(20)
    true = float(theirs.ClipLoss()(x.double(), x.double(), 24.0))
    with _small.largest(0):
        assert float(ours.ClipLoss()(x, x, 24.0)) == pytest.approx(true, rel=1e-5)
    for module in (ours, theirs):
        assert float(module.ClipLoss()(x, x, 24.0)) == pytest.approx(true, abs=1e-6)


@pytest.mark.parametrize("name", CLASSES)
def test_compiles(name):
    given = inputs(name, 20)
    expected = result(made(theirs, name), given)
    torch._dynamo.reset()
    compiled = torch.compile(made(ours, name), fullgraph=True, backend="aot_eager")
    assert difference(result(compiled, given), expected) <= TOLERANCE


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies(name, copied):
    loss = made(ours, name)
    loss(**inputs(name))
    twin = copied(loss)
    assert type(twin) is type(loss)
    assert difference(result(twin, inputs(name)), result(loss, inputs(name))) == 0
    assert twin.load_state_dict(made(theirs, name).state_dict()).missing_keys == []


# Misuse


def _misuse():
    x = torch.randn(4, 3)
    return {
        "widths": (x, torch.randn(4, 2)),
        "more texts": (x, torch.randn(5, 3)),
        "fewer texts": (x, torch.randn(3, 3)),
        "one dimension": (x[0], x[0]),
        "three dimensions": (torch.randn(2, 2, 2), torch.randn(2, 2, 2)),
        "dtypes": (x, x.double()),
        "integers": (x.long(), x.long()),
        "no rows": (x[:0], x[:0]),
        "no tensor": (x, [1.0]),
    }


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss", "DistillClipLoss"])
@pytest.mark.parametrize("what", _misuse())
def test_misuse_is_what_it_was(name, what):
    """The same type of error, or the same number."""
    outcomes = []
    wrong = dict(zip(("image_features", "text_features"), _misuse()[what], strict=True))
    for module in (ours, theirs):
        given = inputs(name, 4, torch.float32) | wrong
        try:
            found = made(module, name)(**given, output_dict=True)["contrastive_loss"]
            outcomes.append(("value", float(found.detach().nan_to_num(-7.0))))
        except Exception as error:
            outcomes.append(("error", type(error)))
    assert outcomes[0] == outcomes[1]


def test_arguments_that_are_wrong():
    for module in (ours, theirs):
        with pytest.raises(AssertionError):
            module.SigLipLoss(dist_impl="carrier pigeon")
        with pytest.raises(TypeError):
            module.SigLipLoss()(torch.eye(2), torch.eye(2), 1.0)
        with pytest.raises(TypeError):
            module.CoCaLoss()
        with pytest.raises(AssertionError):
            # Horovod is not installed
            module.ClipLoss(world_size=2, use_horovod=True)(torch.eye(2), torch.eye(2), 1.0)


def test_processes_that_are_not_there():
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="process group"):
            module.ClipLoss(world_size=2)(torch.eye(2), torch.eye(2), 1.0)


class Smoothed(ours.ClipLoss):
    """A user's class with logits of its own."""

    def get_logits(self, *args, **kwargs):
        return tuple(2 * logits for logits in super().get_logits(*args, **kwargs))


class Shuffled(ours.SigLipLoss):
    """A user's class with targets of its own."""

    def get_ground_truth(self, *args, **kwargs):
        return super().get_ground_truth(*args, **kwargs).flip(0)


@PATHS
def test_what_a_subclass_changes_counts(largest):
    _peer._warned.clear()
    with _small.largest(largest), pytest.warns(UserWarning, match=r"Smoothed with a get_logits.* stores"):
        Smoothed()(**inputs("ClipLoss"))
    with _small.largest(largest):
        given = inputs("ClipLoss")
        doubled = given | {"logit_scale": 2 * given["logit_scale"]}
        torch.testing.assert_close(Smoothed()(**given), theirs.ClipLoss()(**doubled))
        given = inputs("SigLipLoss")
        with pytest.warns(UserWarning, match="Shuffled with a get_ground_truth"):
            Shuffled()(**given)
        turned = given | {"image_features": given["image_features"].flip(0)}
        torch.testing.assert_close(Shuffled()(**given), theirs.SigLipLoss()(**turned))
