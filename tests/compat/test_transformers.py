"""CLIP and SigLIP models of transformers, patched: what the cases of the self-test cannot say."""

import copy
import doctest
import gc
import inspect
import io
import types
import weakref

import pytest
import torch
from torch import nn

from contrastive_kernels.compat import _small, patch_transformers
from contrastive_kernels.compat.check.case import TOLERANCE, Draw, difference
from contrastive_kernels.compat.check.transformers import inputs_of, model_of
from tests.support import adapters

adapters.require_peers()
pytestmark = pytest.mark.peers

ours, transformers = adapters.modules("transformers")

FAMILIES = ("CLIP", "Siglip")
EACH = pytest.mark.parametrize("family", FAMILIES)
PATHS = pytest.mark.parametrize("largest", [0, _small._largest], ids=["sweep", "formula"])


def class_of(family):
    return getattr(transformers, f"{family}Model")


def batch(n=9, dtype=torch.float64):
    """Return inputs whose images have a gradient."""
    return inputs_of(Draw(n, dtype=dtype))


def result(model, given, **options):
    """Return the loss, what else is compared, and the gradients of the parameters and of the images."""
    out = model(**given, **options)
    leaves = [*model.parameters(), given["pixel_values"]]
    grads = torch.autograd.grad(out.loss + out.text_embeds.sum(), leaves, allow_unused=True)
    found = {f"gradient {i}": grad for i, grad in enumerate(grads) if grad is not None}
    return found | {"loss": out.loss.detach(), "text": out.text_embeds.detach(), "image": out.image_embeds.detach()}


@pytest.fixture(autouse=True)
def classes_are_as_before():
    before = [vars(class_of(family))["forward"] for family in FAMILIES]
    yield
    assert [vars(class_of(family))["forward"] for family in FAMILIES] == before


# What a patched model gives


@EACH
@PATHS
@pytest.mark.parametrize("alone", [False, True], ids=["class", "model"])
def test_values_and_gradients(family, alone, largest):
    model = model_of(transformers, family)
    expected = result(model, batch())
    with _small.largest(largest), patch_transformers(model if alone else None):
        assert difference(result(model, batch()), expected) <= TOLERANCE


@EACH
def test_output_is_the_original_without_logits(family):
    """Of the original's class; embeddings and encoder outputs are the same bits."""
    model = model_of(transformers, family)
    model.set_attn_implementation("eager")
    options = dict(output_hidden_states=True, output_attentions=True)
    expected = model(**batch(), **options)
    with patch_transformers(model):
        found = model(**batch(), **options)
    assert type(found) is type(expected)
    assert len(expected.text_model_output.attentions) == 1 < len(expected.text_model_output.hidden_states)
    assert found.logits_per_image is None and found.logits_per_text is None
    assert list(found.keys()) == [key for key in expected if not key.startswith("logits")]
    for embeds in ("text_embeds", "image_embeds"):
        assert torch.equal(found[embeds], expected[embeds])
    for tower in ("text_model_output", "vision_model_output"):
        assert found[tower].keys() == expected[tower].keys()
        for key in ("last_hidden_state", "pooler_output"):
            assert torch.equal(found[tower][key], expected[tower][key])
        for key in ("hidden_states", "attentions"):
            assert len(found[tower][key]) == len(expected[tower][key])
            assert all(map(torch.equal, found[tower][key], expected[tower][key]))


@EACH
@pytest.mark.parametrize("where", ["call", "configuration"])
def test_tuples(family, where):
    """The logits are left out, as None always is."""
    model = model_of(transformers, family)
    expected = model(**batch(), return_dict=False)
    with patch_transformers(model):
        if where == "call":
            found = model(**batch(), return_dict=False)
        elif family == "CLIP":  # its original fails with such a configuration
            return
        else:
            model.config.return_dict = False
            found = model(**batch())
    assert type(found) is tuple and len(found) == len(expected) - 2
    torch.testing.assert_close(found[0], expected[0])
    for mine, theirs in zip(found[1:3], expected[3:5], strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(found[3:], expected[5:], strict=True):
        assert type(mine) is type(theirs)
        assert torch.equal(mine[0], theirs[0])


@EACH
@pytest.mark.parametrize("options", [{}, {"return_loss": False}, {"return_loss": None}], ids=str)
def test_without_a_loss_nothing_changes(family, options):
    model = model_of(transformers, family)
    given = batch()
    del given["return_loss"]
    expected = model(**given, **options)
    for target in (None, model):
        with patch_transformers(target):
            found = model(**given, **options)
        assert found.keys() == expected.keys()
        assert torch.equal(found.logits_per_image, expected.logits_per_image)


@EACH
def test_positional_arguments(family):
    model, given = model_of(transformers, family), batch()
    mask = torch.ones_like(given["input_ids"])
    mask[:, 3:] = 0
    arguments = given["input_ids"], given["pixel_values"], mask, None, True
    expected = model(*arguments)
    with patch_transformers(model):
        found = model(*arguments)
        with pytest.raises(TypeError):
            model(*arguments, False, "one too many")
    assert found.logits_per_image is None
    torch.testing.assert_close(found.loss, expected.loss)


@EACH
def test_misuse_is_what_it_was(family):
    """The same type of error, or the same number."""
    model = model_of(transformers, family)
    wrong = [
        {"input_ids": None},
        {"pixel_values": None},
        {"input_ids": batch(4)["input_ids"]},
        {"pixel_values": torch.randn(9, 3, 5, 5, dtype=torch.float64)},
        {"pixel_values": batch(1)["pixel_values"]},
    ]
    for change in wrong:
        outcomes = []
        for patched in (False, True):
            patch = patch_transformers(model) if patched else None
            try:
                outcomes.append(float(model(**batch() | change).loss.detach()))
            except Exception as error:
                outcomes.append(type(error))
            if patch is not None:
                patch.undo()
        assert outcomes[0] == outcomes[1], change


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(family, dtype):
    """The loss is float32, and that of the embeddings in their own dtype."""
    model = model_of(transformers, family, dtype)
    with patch_transformers(model):
        out = model(**batch(dtype=dtype))
    x, y = out.text_embeds.double(), out.image_embeds.double()
    scale = model.logit_scale.exp().double()
    logits = scale * x @ y.T
    if family == "CLIP":
        expected = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2
    else:
        signs = 2 * torch.eye(9) - 1
        expected = -nn.functional.logsigmoid(signs * (logits + model.logit_bias.double())).sum(1).mean()
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@EACH
def test_autocast(family):
    model = model_of(transformers, family, torch.float32)
    expected = model(**batch(dtype=torch.float32)).loss
    with patch_transformers(model), torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch(dtype=torch.float32)).loss
    assert loss.dtype == torch.float32
    assert abs(loss - expected) < 0.05 * expected


@EACH
def test_compiles(family):
    """Where the original does: the patch adds no break."""
    model, given = model_of(transformers, family), batch(20)
    expected = result(model, given)
    torch._dynamo.reset()
    with patch_transformers(model):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        out = compiled(**given)
    assert out.logits_per_text is None
    torch.testing.assert_close(out.loss, expected["loss"])


# Which models


@EACH
def test_one_model_alone(family):
    model, other = model_of(transformers, family), model_of(transformers, family)
    with patch_transformers(model):
        assert model(**batch()).logits_per_image is None
        assert other(**batch()).logits_per_image is not None
        assert type(model) is class_of(family)
    assert "forward" not in vars(model)
    assert model(**batch()).logits_per_image is not None


@EACH
def test_models_made_before_and_after(family):
    before = model_of(transformers, family)
    handle = patch_transformers()
    after = model_of(transformers, family)
    for model in (before, after):
        assert model(**batch()).logits_per_image is None
    for _ in range(3):
        handle.undo()
    for model in (before, after, model_of(transformers, family)):
        assert model(**batch()).logits_per_image is not None


@EACH
def test_subclasses(family):
    """Those with the inherited forward are patched; one that reads the logits gets them."""
    base = class_of(family)

    class Inherits(base):
        pass

    class Reads(base):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.largest = out.logits_per_image.amax()
            return out

    config = model_of(transformers, family).config
    inherits, reads = Inherits(config).double(), Reads(config).double()
    with patch_transformers():
        assert inherits(**batch()).logits_per_image is None
        assert reads(**batch()).largest.isfinite()
    with patch_transformers(inherits):
        assert inherits(**batch()).logits_per_image is None
    with pytest.raises(TypeError, match=r"CLIPModel or SiglipModel.* not Reads"):
        patch_transformers(reads)


def test_models_of_other_classes():
    clip = model_of(transformers, "CLIP")
    for wrong in (nn.Linear(2, 2), clip.vision_model, nn.Sequential(clip), "CLIPModel", class_of("CLIP")):
        with pytest.raises(TypeError, match="CLIPModel or SiglipModel"):
            patch_transformers(wrong)


def test_model_whose_forward_is_replaced():
    """As accelerate does for mixed precision, which the patch would take off."""
    model = model_of(transformers, "CLIP")
    model.forward = types.MethodType(lambda self, **inputs: "theirs", model)
    with pytest.raises(TypeError, match="patch the model before"):
        patch_transformers(model)
    assert model(**batch()) == "theirs"


@EACH
def test_patches_within_each_other(family):
    model, original = model_of(transformers, family), vars(class_of(family))["forward"]
    expected = model(**batch())
    first, second, third = patch_transformers(model), patch_transformers(), patch_transformers(model)
    without = batch() | {"return_loss": None}
    for handle, left in ((second, True), (first, True), (third, False)):
        assert model(**batch()).logits_per_image is None
        assert torch.equal(model(**without).logits_per_image, expected.logits_per_image)
        handle.undo()
        assert (model(**batch()).logits_per_image is None) == left
    assert vars(class_of(family))["forward"] is original
    assert "forward" not in vars(model)


# Signature, copies, other libraries


@EACH
def test_signature_stays(family):
    """Trainer passes on the columns that it finds there."""
    model = model_of(transformers, family)
    before, of_class = inspect.signature(model.forward), inspect.signature(class_of(family).forward)
    assert "return_loss" in before.parameters
    for target in (None, model):
        with patch_transformers(target):
            assert inspect.signature(model.forward) == before
            assert model.forward.__doc__ == vars(class_of(family))["forward"].__doc__
    with patch_transformers():
        assert inspect.signature(class_of(family).forward) == of_class


@EACH
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: torch.optim.swa_utils.AveragedModel(model).module], ids=["deepcopy", "ema"]
)
def test_copy_uses_its_own_weights(family, copied):
    model = model_of(transformers, family)
    handle = patch_transformers(model)
    twin = copied(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    found = result(twin, batch())
    assert twin(**batch()).logits_per_image is None
    handle.undo()
    fresh = class_of(family)(model.config).double()
    fresh.load_state_dict(twin.state_dict())
    assert difference(found, result(fresh, batch())) <= TOLERANCE
    assert abs(found["loss"] - model(**batch()).loss) > 1e-3


@EACH
def test_saved_and_loaded(family, tmp_path):
    """A patched model saves as the original; whole, it comes back with the forward of its class."""
    model = model_of(transformers, family)
    expected = model(**batch()).loss
    with patch_transformers(model):
        model.save_pretrained(tmp_path)
        file = io.BytesIO()
        torch.save(model, file)
        assert not any("forward" in key for key in model.state_dict())
    loaded = class_of(family).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(loaded(**batch()).loss, expected)
    file.seek(0)
    whole = torch.load(file, weights_only=False)
    out = whole(**batch())
    torch.testing.assert_close(out.loss, expected)
    assert out.logits_per_image is not None
    with patch_transformers(whole):
        out = whole(**batch())
    torch.testing.assert_close(out.loss, expected)
    assert out.logits_per_image is None


def test_patched_model_is_freed():
    model = model_of(transformers, "CLIP")
    reference = weakref.ref(model)
    patch_transformers(model)
    del model
    gc.collect()
    assert reference() is None


@EACH
@pytest.mark.parametrize("alone", [False, True], ids=["class", "model"])
def test_mixed_precision_of_accelerate(family, alone):
    """accelerate wraps the forward and takes the wrapper off again; the patch stays through both."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer may have set it
    model = model_of(transformers, family, torch.float32)
    expected = model(**batch(dtype=torch.float32)).loss
    with patch_transformers(model if alone else None):
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        prepared = accelerator.prepare(model)
        out = prepared(**batch(dtype=torch.float32))
        assert out.logits_per_image is None
        assert abs(out.loss - expected) < 0.05 * expected
        if alone:
            plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
            out = plain(**batch(dtype=torch.float32))
            assert out.logits_per_image is None
            torch.testing.assert_close(out.loss, expected)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_other_names_are_forwarded():
    assert ours.CLIPModel is transformers.CLIPModel
    assert ours.AutoModel is transformers.AutoModel
    with pytest.raises(AttributeError, match="no_such_name"):
        ours.no_such_name  # noqa: B018


def test_examples_run():
    found = doctest.testmod(ours)
    assert found.attempted and not found.failed
