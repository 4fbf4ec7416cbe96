"""open_clip and its trainer patched."""

import importlib
import inspect
import sys
import types

import pytest

from contrastive_kernels.compat import patch_open_clip
from contrastive_kernels.compat.check.case import TOLERANCE, difference
from tests.support.open_clip import CLASSES, inputs, open_clip, ours, result, theirs

pytestmark = pytest.mark.peers


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
