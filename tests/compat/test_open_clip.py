"""open_clip's losses: what the cases of the self-test cannot say."""

import copy
import doctest
import importlib
import inspect
import math
import pickle
import sys
import types
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import python_ref
from benchmarks import libraries
from contrastive_kernels.compat import _peer, _small, patch_open_clip
from contrastive_kernels.compat.check.case import TOLERANCE, difference
from tests.support import adapters

adapters.require_peers()
pytestmark = pytest.mark.peers

ours, theirs = adapters.modules("open_clip")
with libraries.stand_ins():
    open_clip = importlib.import_module("open_clip")

CLASSES = ("ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss")
PATHS = pytest.mark.parametrize("largest", [0, _small._largest], ids=["sweep", "formula"])


def made(module, name, **options):
    """Return a loss; CoCa's weights have no defaults."""
    weights = {"caption_loss_weight": 2.0, "clip_loss_weight": 1.0} if name == "CoCaLoss" else {}
    return getattr(module, name)(**weights, **options)


def inputs(name, n=9, dtype=torch.float64, d=6):
    """Return what a model gives for a loss, by the names that a trainer uses; the teacher has no gradient."""
    generator = torch.Generator().manual_seed(n)

    def unit(width=d):
        return F.normalize(torch.randn(n, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)

    found = {"image_features": unit().requires_grad_(), "text_features": unit().requires_grad_()}
    found["logit_scale"] = torch.tensor(7.0, dtype=dtype, requires_grad=True)
    if name == "SigLipLoss":
        found["logit_bias"] = torch.tensor(-3.0, dtype=dtype, requires_grad=True)
    if name == "CoCaLoss":
        found["logits"] = torch.randn(n, 4, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        found["labels"] = torch.randint(5, (n, 4), generator=generator)
    if name == "DistillClipLoss":
        found |= {"dist_image_features": unit(3), "dist_text_features": unit(3), "dist_logit_scale": torch.tensor(11.0)}
    return found


def result(loss, given, **options):
    """Return value and gradients of a loss."""
    found = loss(**given, output_dict=True, **options)
    assert all(type(value) is torch.Tensor for value in found.values())
    leaves = {name: x for name, x in given.items() if getattr(x, "requires_grad", False)}
    total = sum((i + 1) * value for i, value in enumerate(found.values()))
    grads = torch.autograd.grad(total, list(leaves.values()))
    found = {key: value.detach() for key, value in found.items()}
    return {**found, **{f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}}


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
@pytest.mark.parametrize("kind", [float, lambda x: torch.tensor([x], dtype=torch.float64), lambda x: torch.tensor(x)])
def test_scale_of_any_kind(name, kind, largest):
    given = inputs(name) | {"logit_scale": kind(5.0)}
    with _small.largest(largest):
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
    with _small.largest(largest):
        given = inputs("ClipLoss")
        doubled = given | {"logit_scale": 2 * given["logit_scale"]}
        torch.testing.assert_close(Smoothed()(**given), theirs.ClipLoss()(**doubled))
        given = inputs("SigLipLoss")
        turned = given | {"image_features": given["image_features"].flip(0)}
        torch.testing.assert_close(Shuffled()(**given), theirs.SigLipLoss()(**turned))


# Several processes


def gathered(group, name, options, n, module):
    """Return value, gradients and the sum of the gradients' averages over the ranks, by ours or theirs."""
    del group
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = inputs(name, n * world)
    own = {
        key: x.detach()[rank * n : (rank + 1) * n].requires_grad_(x.requires_grad) if x.dim() else x
        for key, x in whole.items()
    }
    loss = made({"ours": ours, "theirs": theirs}[module], name)
    # read at every call
    for key, value in {**options, "rank": rank, "world_size": world}.items():
        setattr(loss, key, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return result(loss, own)


def stored(group, name, options):
    """Raise if a rank holds a matrix of its similarities."""
    del group
    rank, world = dist.get_rank(), dist.get_world_size()
    n = 700
    loss = made(ours, name, rank=rank, world_size=world, **options)
    with adapters.NoMatrix(math.isqrt(n * n)):
        result(loss, inputs(name, n, torch.float32, 32))


def imported(group):
    """Import what the tests of several processes need, which takes a while."""
    del group


@pytest.fixture(scope="module")
def processes(ranks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.support.ranks.PATIENCE", 300)
        ranks.run(3, imported)
    return ranks


MODES = [dict(local_loss=local, gather_with_grad=grad) for local in (False, True) for grad in (False, True)]
GATHERED = [
    *[(name, mode) for name in ("ClipLoss", "CoCaLoss", "DistillClipLoss") for mode in MODES],
    *[("SigLipLoss", {"dist_impl": kind}) for kind in ("bidir", "shift", "reduce", "gather")],
]


@pytest.mark.parametrize(("name", "options"), GATHERED, ids=str)
def test_several_processes(processes, name, options):
    """Value and gradients of every rank are those of the peer, in both directions of a ring of three."""
    for n in (1, 5):
        found = processes.run(3, gathered, name, options, n, "ours")
        expected = processes.run(3, gathered, name, options, n, "theirs")
        for mine, peer in zip(found, expected, strict=True):
            assert difference(mine, peer) <= TOLERANCE


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_gradients_against_the_whole_batch(processes, mode):
    """Which modes give, averaged over the ranks, the gradient of all rows: those that cross ranks."""
    n, world = 4, 3
    found = processes.run(world, gathered, "ClipLoss", mode, n, "ours")
    whole = result(ours.ClipLoss(), inputs("ClipLoss", n * world))
    mean = sum(part["contrastive_loss"] for part in found) / world
    torch.testing.assert_close(mean, whole["contrastive_loss"])
    image = torch.cat([part["gradient of image_features"] for part in found]) / world
    exact = whole["gradient of image_features"]
    # every rank that has the whole loss adds its share to a row that belongs to one
    apart = float((image - exact).abs().max() / exact.abs().max())
    assert (apart < 1e-12) == mode["gather_with_grad"]
    if not mode["gather_with_grad"] and not mode["local_loss"]:
        torch.testing.assert_close(image * world, exact)


@pytest.mark.parametrize(("name", "options"), [g for g in GATHERED if g[0] in ("ClipLoss", "SigLipLoss")], ids=str)
def test_several_processes_store_no_matrix(processes, name, options):
    processes.run(3, stored, name, options)


def test_distillation_of_several_processes_warns():
    _peer._warned.discard(("DistillClipLoss", "world_size > 1"))
    loss = ours.DistillClipLoss(world_size=2)
    for expected in (pytest.warns(UserWarning, match="DistillClipLoss with world_size > 1 stores"), None):
        with expected or warnings.catch_warnings():
            if expected is None:
                warnings.simplefilter("error")
            with pytest.raises(ValueError, match="process group"):
                loss(**inputs("DistillClipLoss"))


# Patching


def trainer(monkeypatch):
    """Return a module of the trainer, with a loss under another name."""
    module = types.ModuleType("open_clip_train.mine")
    module.create_loss, module.Softmax, module.other = open_clip.create_loss, theirs.ClipLoss, theirs.gather_features
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def names_of_losses():
    """Return what every name of open_clip's modules stands for."""
    return {
        (name, key): value
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in ("open_clip", "open_clip_train") and module is not None
        for key, value in vars(module).items()
        if not key.startswith("__")
    }


def test_patch_replaces_every_name_and_puts_it_back(monkeypatch):
    module = trainer(monkeypatch)
    before = names_of_losses()
    handle = patch_open_clip()
    for place in (open_clip, theirs, importlib.import_module("open_clip.factory")):
        assert place.ClipLoss is ours.ClipLoss
        assert place.CoCaLoss is ours.CoCaLoss
        assert place.DistillClipLoss is ours.DistillClipLoss
    assert theirs.SigLipLoss is ours.SigLipLoss
    assert open_clip.create_loss is ours.create_loss
    assert (module.create_loss, module.Softmax, module.other) == (
        ours.create_loss,
        ours.ClipLoss,
        theirs.gather_features,
    )
    changed = {key for key, value in names_of_losses().items() if value is not before[key]}
    assert {key for _, key in changed} == {*CLASSES, "create_loss", "Softmax"}
    for _ in range(2):
        handle.undo()
        after = names_of_losses()
        assert after.keys() == before.keys()
        assert all(after[key] is before[key] for key in before)


def test_patches_within_each_other():
    original = open_clip.ClipLoss
    with patch_open_clip() as outer:
        with ours.patch_open_clip():
            assert open_clip.ClipLoss is ours.ClipLoss
        assert open_clip.ClipLoss is ours.ClipLoss
        # undone early: the later one stays in force
        inner = patch_open_clip()
        outer.undo()
        assert open_clip.ClipLoss is ours.ClipLoss
        inner.undo()
        assert open_clip.ClipLoss is original
    assert open_clip.ClipLoss is original


def arguments(**options):
    defaults = dict(
        model="ViT-B-32", distill=False, siglip=False, local_loss=True, gather_with_grad=True, rank=1, world_size=1
    )
    defaults |= dict(coca_caption_loss_weight=2.0, coca_contrastive_loss_weight=1.0, horovod=False, loss_dist_impl=None)
    return types.SimpleNamespace(**(defaults | options))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "ClipLoss"),
        ({"model": "CoCa_ViT-B-32"}, "CoCaLoss"),
        ({"distill": True}, "DistillClipLoss"),
        ({"siglip": True, "loss_dist_impl": "shift"}, "SigLipLoss"),
    ],
)
@pytest.mark.parametrize("patched", [False, True])
def test_create_loss(options, name, patched):
    peer = open_clip.create_loss(arguments(**options))
    assert type(peer) is getattr(theirs, name)
    attributes = {key: str(value) for key, value in vars(peer).items()}
    if patched:
        with patch_open_clip():
            # names that the patch does not know lead to its classes too
            found = [open_clip.create_loss(arguments(**options)), ours._create_loss(arguments(**options))]
    else:
        found = [ours.create_loss(arguments(**options))]
    for loss in found:
        assert type(loss) is getattr(ours, name)
        assert {key: str(value) for key, value in vars(loss).items()} == attributes
        assert difference(result(loss, inputs(name)), result(peer, inputs(name))) <= TOLERANCE


def test_create_loss_refuses_what_the_trainer_refuses():
    assert inspect.signature(ours.create_loss).parameters.keys() == {"args"}
    with pytest.raises(AssertionError):
        ours.create_loss(arguments(siglip=True, horovod=True))
