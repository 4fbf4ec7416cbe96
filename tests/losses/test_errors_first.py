"""Bad arguments are refused before any work: no operation reads or writes as much as the features."""

import inspect
import re
import typing
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import contrastive_kernels as ck
from tests.support.testing import Case, Outcome, case_params, differentiate, matching_ids
from tests.support.variants import EVERY

SHAPE = N, M, D = 48, 80, 32


class NoWork(TorchDispatchMode):
    """Fails at an operation that reads or writes a tensor of so many elements; views and new metadata are free."""

    FREE = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")

    def __init__(self, elements: int):
        super().__init__()
        self.elements = elements

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            read = () if function._schema.name.removeprefix("aten::") in self.FREE else (args, kwargs or {})
            sizes = [x.numel() for x in tree_leaves((read, out)) if isinstance(x, torch.Tensor)]
            assert max(sizes, default=0) < self.elements, f"{function} before the error"
        return out


def vector(n):
    return torch.rand(n, dtype=torch.float64)


def integers(n):
    return torch.zeros(n, dtype=torch.int64)


# Values that every loss with an argument of that name refuses. Literal choices are refused by their own names.
BAD = {
    "reduction": ["average"],
    "backend": ["cuda"],
    "group": ["everyone", 7],
    "temperature": [0.0, vector(2)],
    "logit_scale": [vector(2), "hot"],
    "logit_bias": [vector(2)],
    "base_temperature": [0.0],
    "weight": [vector(N + 1), integers(N)],
    "label_smoothing": [2.0],
    "ids": [integers(N + 1), vector(N)],
    "query_ids": [integers(N + 1), vector(N)],
    "key_ids": [integers(N + 3)],
    "labels": [integers(N + 1), vector(N).to(torch.complex128)],
    "unlabelled": ["none"],
    "contrast_features": [vector(2)],
    "contrast_labels": [integers(N)],
    "exclude": [integers(N + 1), vector(N)],
    "cutoff": [vector(N + 1), "none"],
    "cutoff_margin": [vector(N + 1), "none"],
    "threshold": [vector(N + 1)],
    "guide": [7, (torch.rand(N + 1, 3), torch.rand(N, 3)), (torch.rand(N, 3),)],
    "guide_cutoff": ["none", 0.1],
    "tau_plus": [1.0, "none"],
    "beta": [-0.5],
    "positive_weight": [2.0, vector(N + 1), (vector(N),), (vector(N), vector(N + 1))],
    "context_size": [0, 1.5],
    "k": [0, 1.5],
    "top_k": [0, 1.5],
    "factor": ["two"],
    "margin": ["wide"],
    "lower": [0.9],
    "upper": [1.5],
    "t": [vector(2)],
    "df": [0.0],
    "mu": [0.0, "one"],
    "lambd": [vector(2)],
    "sim_weight": ["high"],
    "var_weight": ["high"],
    "cov_weight": ["high"],
    "eps": [-1.0],
    "std_eps": [-1.0, "none"],
    "sigma": [0.0],
    "gamma": [0.1],
    "C": [0.0],
    "reg": [-0.1],
    "eta": [0.0],
    "a0": [1.5],
    "tolerance": [-1.0],
    "max_iterations": [0],
    "block_size": [0],
    "alpha0": [vector(2)],
}
# Arguments without a bad value: flags, and a band that was checked when it was made.
ANYTHING = {"normalize", "symmetric", "in_batch_negatives", "return_stats", "negative_only", "project"}
ANYTHING |= {"include_diagonal", "use_norm", "nesterov", "detach_weights", "polarization"}


def choices(case: Case) -> set[str]:
    """Return the names of the arguments that are one of several strings."""
    hints = typing.get_type_hints(getattr(ck, case.loss))
    return {k for k, hint in hints.items() if "Literal" in str(hint) and k not in BAD}


def arguments(case: Case) -> list[str]:
    """Return the names of all arguments but the features."""
    return [k for k in inspect.signature(getattr(ck, case.loss)).parameters if k not in case.shapes(1, 1, 1)]


def bad_params() -> list:
    found = []
    for name, case in EVERY.items():
        for argument in arguments(case):
            if argument in ANYTHING or argument in ("negative_keys", "z1"):
                continue
            values = ["unknown"] if argument in choices(case) else BAD[argument]
            found += [
                pytest.param(case, {argument: value}, argument, id=f"{name}-{argument}-{i}")
                for i, value in enumerate(values)
            ]
        if case.takes("logit_scale"):
            both = {"temperature": 0.1, "logit_scale": 10.0}
            found.append(pytest.param(case, both, "temperature and logit_scale", id=f"{name}-both_scales"))
        if case.takes("cutoff_margin"):
            both = {"cutoff": 0.1, "cutoff_margin": 0.1}
            found.append(pytest.param(case, both, "cutoff and cutoff_margin", id=f"{name}-both_cutoffs"))
    return found


@pytest.mark.parametrize(("case", "bad", "names"), bad_params())
def test_errors_come_before_any_work(case, bad, names):
    features = case.features(SHAPE, torch.float32)
    fixed = {k: v for k, v in case.options.items() if not (k == "logit_scale" and "temperature" in bad)}
    with NoWork(N * D), pytest.raises((ValueError, TypeError)) as caught:
        getattr(ck, case.loss)(**{**fixed, **features, **bad})
    assert names in str(caught.value)


BAD_FEATURES = {
    "integers": (TypeError, lambda x: x.long()),
    "a list": (TypeError, lambda x: x.tolist()),
    "a vector": (ValueError, lambda x: x.flatten()[:N]),
    "empty": (ValueError, lambda x: x[:0]),
    "dimension": (ValueError, lambda x: x[..., 1:]),
    "dtype": (TypeError, lambda x: x.double()),
    "device": (RuntimeError, lambda x: x.to("meta")),
}
# Differences to the other features, of which some losses have none.
DIFFERENT = ("dimension", "dtype", "device")


FEATURES = [
    pytest.param(case, feature, id=f"{name}-{feature}")
    for name, case in EVERY.items()
    for feature in case.shapes(*SHAPE)
    if not feature.endswith("labels")
]


@pytest.mark.parametrize(("case", "feature"), FEATURES)
def test_bad_features_are_refused_before_any_work(case, feature):
    alone = len([name for name in case.shapes(*SHAPE) if not name.endswith("labels")]) == 1
    may_be_empty = feature in ("queue", "negative_keys")
    for kind, (error, spoil) in BAD_FEATURES.items():
        if (alone and kind in DIFFERENT) or (may_be_empty and kind == "empty"):
            continue
        features = case.features(SHAPE, torch.float32)
        features[feature] = spoil(features[feature])
        with NoWork(N * D), pytest.raises(error) as caught:
            case(ck, features)
        assert feature in str(caught.value), kind


# Layouts that no kernel reads.
LAYOUTS = {
    "nested": lambda x: torch.nested.nested_tensor([*x]),
    "jagged": lambda x: torch.nested.nested_tensor([*x], layout=torch.jagged),
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
}


@pytest.mark.filterwarnings("ignore:.*prototype stage", "ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "feature"), FEATURES)
def test_features_that_are_not_dense_are_refused_before_any_work(case, feature, layout):
    features = case.features(SHAPE, torch.float32)
    features[feature] = LAYOUTS[layout](features[feature])
    with NoWork(N * D), pytest.raises(TypeError, match=f"{feature} (is a nested tensor|has layout torch[.])"):
        case(ck, features)


@pytest.mark.filterwarnings("ignore:.*prototype stage")
@pytest.mark.parametrize("module", [ck.MoCoLoss, ck.MoCoArCLLoss, ck.NNCLRLoss])
def test_a_queue_takes_no_nested_rows(module):
    loss, rows = module(D, 2 * N), torch.randn(N, D)
    names = [*inspect.signature(loss.forward).parameters][:2]
    for place, name in enumerate(names):
        inputs = [rows, rows]
        inputs[place] = LAYOUTS["nested"](rows)
        with pytest.raises(TypeError, match=f"{name} is a nested tensor"):
            loss(*inputs)


# Arguments that the other ones leave without effect: the case, the arguments, and the one that is named.
PGD = ("use_norm", False), ("eta", 0.1), ("nesterov", False), ("a0", 0.5), ("stop", "change")
PGD += ("tolerance", 0.1), ("max_iterations", 10)
SHARED = EVERY["easy_negative-shared"]
WITHOUT_EFFECT = {
    **{
        f"{name}-ids": (EVERY[name], {"query_ids": integers(N)}, "query_ids")
        for name in ("info_nce-shared", "info_nce-paired", "moco", "moco_arcl", "easy_negative-shared")
    },
    "easy_negative-below-ids": (
        replace(SHARED, options={"select": "below", "threshold": 0.0}),
        {"query_ids": integers(N)},
        "query_ids",
    ),
    "label_pull-temperature": (EVERY["label_pull"], {"temperature": 0.1}, "temperature 0.1"),
    "label_pull-logit_scale": (EVERY["label_pull"], {"logit_scale": torch.ones(())}, "logit_scale has no effect"),
    **{
        f"hard_negative-easy-{name}": (EVERY["hard_negative-easy"], {name: value}, name)
        for name, value in (("tau_plus", 0.2), ("beta", 2.0), ("detach_weights", True))
    },
    **{
        f"sup_con-{reduction}": (
            EVERY["sup_con"],
            {"average": "with_positives", "reduction": reduction},
            "average 'with_positives' has no effect with reduction=",
        )
        for reduction in ("sum", "none")
    },
    **{f"mmcl-inverse-{name}": (EVERY["mmcl"], {name: value}, name) for name, value in PGD},
    **{
        f"mmcl-{kernel}-sigma": (EVERY["mmcl"], {"kernel": kernel}, "sigma 1.0 has no effect with kernel=")
        for kernel in ("linear", "poly", "min")
    },
    "mmcl-tensor-sigma": (EVERY["mmcl"], {"kernel": "min", "sigma": torch.ones(())}, "sigma has no effect"),
    "mmcl-gamma-sigma": (EVERY["mmcl"], {"gamma": "auto"}, "sigma 1.0 has no effect with gamma="),
    "mmcl-linear-gamma": (
        replace(EVERY["mmcl"], options={}),
        {"kernel": "linear", "gamma": "auto"},
        "gamma 'auto' has no effect with kernel='linear'",
    ),
    "mmcl-norm-eta": (EVERY["mmcl"], {"solver": "pgd", "eta": 0.1}, "eta 0.1 has no effect with use_norm=True"),
    "mmcl-plain-a0": (
        EVERY["mmcl"],
        {"solver": "pgd", "nesterov": False, "a0": 0.5},
        "a0 0.5 has no effect with nesterov=False",
    ),
}


@pytest.mark.parametrize(("case", "given", "names"), WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT)
def test_an_argument_without_effect_is_refused_before_any_work(case, given, names):
    features = case.features(SHAPE, torch.float32)
    with NoWork(N * D), pytest.raises(ValueError, match=re.escape(names)):
        getattr(ck, case.loss)(**{**case.options, **features, **given})


# Other values than the cases have. A choice takes all others, a flag its opposite; ids and weights are drawn.
OTHER = {
    "temperature": 0.3,
    "logit_scale": 2.3,
    "logit_bias": 0.7,
    "base_temperature": 0.3,
    "reduction": "sum",
    "label_smoothing": 0.2,
    "cutoff": 0.0,
    "cutoff_margin": -0.1,
    "guide_cutoff": 0.0,
    "threshold": 0.9,
    "top_k": 2,
    "factor": 3.0,
    "tau_plus": 0.3,
    "beta": 0.7,
    "context_size": 4,
    "k": 3,
    "margin": 0.6,
    "lower": 0.3,
    "upper": 0.7,
    "t": 0.9,
    "df": 3.0,
    "mu": 0.4,
    "lambd": 0.3,
    "sim_weight": 4.0,
    "var_weight": 4.0,
    "cov_weight": 4.0,
    "eps": 0.05,
    "std_eps": 0.05,
    "sigma": 2.5,
    "gamma": "auto",
    "C": 0.05,
    "reg": 0.3,
    "eta": 0.01,
    "a0": 0.5,
    "tolerance": 0.1,
    "max_iterations": 3,
    "block_size": 5,
    "polarization": ck.Polarization(0.2, 0.7, 2.0),
}
# Arguments that may change nothing, because the mathematics says so.
NEUTRAL = {
    ("info_nce_loss", "in_batch_negatives"): "True is the default without negative_keys",
    ("nt_xent_loss", "multi_view"): "two views are one pair",
    ("clip_loss", "logit_bias"): "a softmax does not see it; the statistics do",
    ("sup_con_loss", "average"): "all anchors have positives, or the mean is over pairs",
    ("sup_con_loss", "contrast_mode"): "of one view it is all or the first",
    ("spectral_contrastive_loss", "method"): "two ways to one loss",
    ("spectral_contrastive_loss", "reduction"): "the case has it",
}
# The same numbers from elsewhere, or more than the loss.
ELSEWHERE = ("backend", "group", "return_stats", "negative_keys", "z1", "labels")
ELSEWHERE += ("contrast_features", "contrast_labels", "exclude")


def others(case: Case, argument: str, n: int, features: dict) -> list:
    """Return values of an argument that the case does not have."""
    if argument == "unlabelled":  # the label of most samples
        return [features["labels"][features["labels"] >= 0].mode().values.item()]
    function = getattr(ck, case.loss)
    if argument in OTHER:
        return [OTHER[argument]]
    if argument == "alpha0":
        return [torch.rand(n, n)]
    if argument in ("weight", "positive_weight"):
        return [0.5 + torch.rand(n)]
    if argument == "guide":
        return [(torch.randn(n, 3, dtype=torch.float64),) * 2]
    value = case.options.get(argument, inspect.signature(function).parameters[argument].default)
    if argument in choices(case):
        hint = typing.get_type_hints(function)[argument]
        return [choice for choice in typing.get_args(hint) if choice != value]
    return [not value]


def is_neutral(case: Case, argument: str, features) -> bool:
    """Return whether the mathematics says of this case alone that an argument changes nothing."""
    if argument == "positive":  # the least similar pair of two views is the only one, whose mean is the same
        return "views" in features and features["views"].shape[1] == 2
    # unit rows lie in the ball of radius sqrt(mu) = 1, up to rounding
    return argument == "project" and case.options.get("normalize", False) and "mu" not in case.options


@pytest.mark.parametrize("case", case_params(EVERY))
def test_every_argument_changes_the_loss_or_is_refused(case):
    """What an argument says is never ignored: the value or a gradient is another, or there is an error."""
    n, m, d = 12, 9, 5
    features = case.features((n, m, d), torch.float64)

    def run(options):
        fixed = {**case.options, **options}
        try:
            return differentiate(lambda **tensors: getattr(ck, case.loss)(**tensors, **fixed), features)
        except ValueError as error:
            return str(error)

    for argument in set(arguments(case)) - {*ELSEWHERE}:
        rows = case.takes("reduction") and argument not in ("reduction", "average")
        fixed = {"reduction": "none"} if rows else {}
        # ids of the queries and of the keys go together
        ids = argument.endswith("ids") and matching_ids(case, n, m)
        for given in [ids] if ids else [{argument: value} for value in others(case, argument, n, features)]:
            changed = run({**fixed, **given})
            if isinstance(changed, str):
                # another mode takes features of another shape
                assert argument in changed or "must have shape" in changed
            elif (case.loss, argument) not in NEUTRAL and not is_neutral(case, argument, features):
                assert not same(changed, run(fixed)), f"{given} is ignored"


@pytest.mark.parametrize("case", case_params(EVERY))
def test_numbers_of_numpy_are_numbers(case):
    """Of any width, they give the bits that Python's number gives."""
    features = case.features((12, 9, 5), torch.float32)

    def run(argument, value):
        fixed = {k: v for k, v in case.options.items() if not (argument == "temperature" and k == "logit_scale")}
        try:
            return getattr(ck, case.loss)(**{**fixed, **features, argument: value})
        except ValueError as error:  # without effect here
            return str(error)

    for argument in set(arguments(case)) & {*OTHER}:
        if isinstance(OTHER[argument], (int, float)):
            kinds = (np.int64, np.int32) if isinstance(OTHER[argument], int) else (np.float64, np.float32, np.float16)
            for kind in kinds:
                number = kind(OTHER[argument])
                found, expected = run(argument, number), run(argument, number.item())
                assert type(found) is type(expected)
                if isinstance(found, torch.Tensor):
                    assert found.dtype == expected.dtype and torch.equal(found, expected), number


def same(x: Outcome, y: Outcome) -> bool:
    """Return whether value and gradients have the same bits."""
    if x.value.shape != y.value.shape or not torch.equal(x.value, y.value):
        return False
    pairs = [(x.gradients[name], y.gradients[name]) for name in x.gradients]
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def test_a_default_that_is_passed_is_no_error():
    """It cannot be told from one that is not."""
    z = torch.randn(2, N, D)
    easy = ck.hard_negative_loss(*z, estimator="easy", tau_plus=0.1, beta=1.0, detach_weights=False)
    assert torch.equal(easy, ck.hard_negative_loss(*z, estimator="easy"))
    linear = ck.mmcl_loss(*z, kernel="linear", sigma=50.0, solver="inverse", eta=1e-3)
    assert torch.equal(linear, ck.mmcl_loss(*z, kernel="linear"))


def test_work_is_noticed():
    """A comparison that could not fail would find no error late."""
    x = torch.randn(N, D)
    for work in (lambda: torch.stack([x, x]), lambda: x.sum(), lambda: x.mul_(2), lambda: ck.uniformity_loss(x)):
        with pytest.raises(AssertionError, match="before the error"), NoWork(N * D):
            work()
    with NoWork(N * D):
        x.T, x[3:], x.detach(), x.new_zeros(3), x[0].sum()
