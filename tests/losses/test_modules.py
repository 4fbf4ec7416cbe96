"""Modules hold the options of their functions, which may be set anew, and refuse at construction what they can."""

import copy
import inspect
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import contrastive_kernels as ck
from contrastive_kernels.losses._module import KeyQueue, LossModule
from tests.support.testing import case_params
from tests.support.variants import EVERY

SHAPE = N, M, D = 12, 9, 5
CLASSES = [value for value in vars(ck).values() if inspect.isclass(value) and issubclass(value, LossModule)]
MODULES = {module.function: module for module in CLASSES if module is not ck.LMCLLoss}
QUEUES = [module for module in CLASSES if issubclass(module, KeyQueue)]


def made(module, **options):
    """Return a module, with a queue of M rows of D if it has one."""
    return module(*((D, M) if issubclass(module, KeyQueue) else ()), **options)


def keyword_only(function):
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def value_of(loss):
    return loss[0] if isinstance(loss, tuple) else loss


@pytest.mark.parametrize("case", case_params(EVERY))
def test_options_assigned_to_a_module_are_those_of_its_function(case):
    function, features = getattr(ck, case.loss), case.features(SHAPE)
    module = made(MODULES[function]).eval()
    for name in {"queue", "support"} & set(features):
        module.queue = features[name] = F.normalize(features[name], dim=1)
    rows = {name: x for name, x in features.items() if name not in ("queue", "support")}
    given = {name: value for name, value in case.options.items() if name not in keyword_only(function)}
    for name, value in {**case.options, "backend": "torch"}.items():
        if name in keyword_only(function):
            setattr(module, name, value)
    expected = value_of(case(ck, features, backend="torch"))
    torch.testing.assert_close(value_of(module(**rows, **given)), expected)


def test_an_assigned_option_takes_effect():
    """Whether or not the constructor had listed it."""
    a, b = torch.randn(2, N, D, dtype=torch.float64)
    for name, value in {"reduction": "none", "cutoff": -0.9, "label_smoothing": 0.5, "return_stats": True}.items():
        module = ck.NTXentLoss(0.5)
        before = module(a, b)
        setattr(module, name, value)
        after, expected = (value_of(loss) for loss in (module(a, b), ck.NTXentLoss(0.5, **{name: value})(a, b)))
        assert torch.equal(after, expected)
        assert name == "return_stats" or after.shape != before.shape or not torch.equal(after, before)
    clip = ck.ClipLoss()
    clip.normalize = True
    assert torch.equal(clip(a, b, 5.0), ck.clip_loss(a, b, 5.0, normalize=True))
    queue = ck.MoCoLoss(D, M)
    queue.reduction = "none"
    assert queue(a.float(), b.float()).shape == (N,)
    base = ck.LMCLLoss("debiased")
    base.tau_plus = 0.3
    expected = ck.debiased_loss(a, b, tau_plus=0.3, polarization=ck.Polarization())
    assert torch.equal(base(a, b), expected)


def test_an_assigned_parameter_is_trained():
    a, b = torch.randn(2, N, D)
    module = ck.NTXentLoss(logit_scale=5.0)
    module.logit_scale = nn.Parameter(torch.tensor(5.0))
    module(a, b).backward()
    assert [name for name, p in module.named_parameters() if p.grad] == ["logit_scale"]


def test_an_assigned_option_is_compiled_anew():
    torch._dynamo.reset()
    a, b = torch.randn(2, N, D)
    module = ck.NTXentLoss(0.5, backend="torch")
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(a, b), module(a, b))
    module.cutoff, module.reduction = 0.1, "none"
    expected = ck.nt_xent_loss(a, b, temperature=0.5, cutoff=0.1, reduction="none", backend="torch")
    torch.testing.assert_close(compiled(a, b), expected)


@pytest.mark.parametrize("module", CLASSES, ids=lambda module: module.__name__)
def test_nothing_but_what_differs_from_the_defaults_is_shown(module):
    """Nor is a default in the state."""
    loss = made(module)
    name, size = module.__name__, "dim=5, queue_size=9" if issubclass(module, KeyQueue) else ""
    shown = f"polarization={ck.Polarization()}" if module is ck.LMCLLoss else size
    assert repr(loss) == f"{name}({shown})"
    assert set(loss.state_dict()) == ({"queue", "position"} if size else set())
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(copied) == repr(loss)


def test_a_default_given_to_the_constructor_is_not_shown():
    assert repr(ck.DebiasedLoss(tau_plus=float("0.1"))) == "DebiasedLoss()"
    assert repr(ck.NNCLRLoss(D, M, normalize=True)) == "NNCLRLoss(dim=5, queue_size=9)"


POSITIONAL = [
    (module, name)
    for module in MODULES.values()
    for name in inspect.signature(module.forward).parameters
    if name not in ("self", "inputs")
]


@pytest.mark.parametrize(("module", "name"), POSITIONAL, ids=[f"{m.__name__}-{name}" for m, name in POSITIONAL])
def test_an_input_of_the_call_is_no_option(module, name):
    message = f"{module.__name__} has no option {name!r}: give it to the call"
    with pytest.raises(TypeError, match=re.escape(message)):
        made(module, **{name: nn.Parameter(torch.ones(()))})


@pytest.mark.parametrize("module", QUEUES)
def test_a_queue_is_no_option(module):
    (name,) = {"queue", "support"} & set(inspect.signature(module.function).parameters)
    with pytest.raises(TypeError, match=f"{module.__name__} has no option {name!r}; it takes temperature, "):
        module(D, M, **{name: torch.randn(M, D)})


REFUSED = {
    "reduction": (lambda: ck.NTXentLoss(reduction="avg"), ValueError, "one of 'mean', 'sum', 'none', 'sum_directions'"),
    "another's reduction": (lambda: ck.ClipLoss(reduction="sum_directions"), ValueError, "'mean', 'sum', 'none'"),
    "base's reduction": (lambda: ck.LMCLLoss("debiased", reduction="sum_directions"), ValueError, "reduction"),
    "choice": (lambda: ck.TripletMarginLoss(mining="easy"), ValueError, "mining 'easy' is unknown"),
    "label_smoothing": (lambda: ck.InfoNCELoss(label_smoothing=1.5), ValueError, "label_smoothing 1.5 must be"),
    "polarization": (lambda: ck.NTXentLoss(polarization={"lower": 0.1}), TypeError, "a Polarization, not dict"),
    "dim": (lambda: ck.MoCoLoss(0.1), TypeError, "dim must be an integer, not float"),
    "float dim": (lambda: ck.NNCLRLoss(8.0, 4), TypeError, "dim must be an integer, not float"),
    "no dim": (lambda: ck.MoCoArCLLoss(0, 4), ValueError, "dim 0 must be at least 1"),
    "queue_size": (lambda: ck.MoCoLoss(8, -4), ValueError, "queue_size -4 must be at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_batch_could_make_right_is_refused_at_construction(name):
    make, error, message = REFUSED[name]
    with pytest.raises(error) as caught:
        make()
    assert type(caught.value) is error and message in str(caught.value)


REDUCED = [module for function, module in MODULES.items() if "reduction" in keyword_only(function)]


@pytest.mark.parametrize("module", REDUCED, ids=lambda module: module.__name__)
def test_the_constructor_knows_the_reductions_of_the_function(module):
    """Each is taken by both, and another by neither."""
    case = next(case for case in EVERY.values() if getattr(ck, case.loss) is module.function)
    for reduction in module.reductions:
        case(ck, case.features(SHAPE), reduction=reduction)
        assert made(module, reduction=reduction).reduction == reduction
    with pytest.raises(ValueError, match="reduction 'average' is unknown") as of_the_module:
        made(module, reduction="average")
    with pytest.raises(ValueError, match="reduction 'average' is unknown") as of_the_function:
        case(ck, case.features(SHAPE), reduction="average")
    assert str(of_the_module.value) == str(of_the_function.value)


def test_the_large_margin_module_knows_the_reductions_of_its_base():
    a, b = torch.randn(2, N, D)
    expected = ck.nt_xent_loss(a, b, reduction="sum_directions", polarization=ck.Polarization())
    assert torch.equal(ck.LMCLLoss("nt_xent", reduction="sum_directions")(a, b), expected)


@pytest.mark.parametrize("module", QUEUES)
def test_rows_of_another_dimension_than_the_queue(module):
    """As when dim and queue_size are exchanged."""
    loss, views = module(64, D), torch.randn(N, 2, D)
    inputs = {ck.MoCoLoss: (views[:, 0], views[:, 1]), ck.NNCLRLoss: (views, views)}.get(module, (views[:, 0], views))
    with pytest.raises(ValueError, match=rf"of dimension 5, and this {module.__name__} was made with dim=64"):
        loss(*inputs)
