"""Bad arguments are refused before any work: no operation reads or writes as much as the features."""

import inspect
import typing

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import contrastive_kernels as ck
from tests.support.testing import Case
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
    "temperature": [0.0, vector(2)],
    "logit_scale": [vector(2), "hot"],
    "logit_bias": [vector(2)],
    "base_temperature": [0.0],
    "weight": [vector(N + 1), integers(N)],
    "label_smoothing": [2.0],
    "ids": [integers(N + 1), vector(N)],
    "query_ids": [integers(N + 1), vector(N)],
    "key_ids": [integers(N + 3)],
    "labels": [integers(N + 1), vector(N)],
    "cutoff": [vector(N + 1), "none"],
    "cutoff_margin": [vector(N + 1), "none"],
    "threshold": [vector(N + 1)],
    "tau_plus": [1.0, "none"],
    "beta": [-0.5],
    "positive_weight": [2.0, vector(N + 1)],
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
    if feature != "labels"
]


@pytest.mark.parametrize(("case", "feature"), FEATURES)
def test_bad_features_are_refused_before_any_work(case, feature):
    alone = len({*case.shapes(*SHAPE)} - {"labels"}) == 1
    may_be_empty = feature in ("queue", "negative_keys")
    for kind, (error, spoil) in BAD_FEATURES.items():
        if (alone and kind in DIFFERENT) or (may_be_empty and kind == "empty"):
            continue
        features = case.features(SHAPE, torch.float32)
        features[feature] = spoil(features[feature])
        with NoWork(N * D), pytest.raises(error) as caught:
            case(ck, features)
        assert feature in str(caught.value), kind


def test_work_is_noticed():
    """A comparison that could not fail would find no error late."""
    x = torch.randn(N, D)
    for work in (lambda: torch.stack([x, x]), lambda: x.sum(), lambda: x.mul_(2), lambda: ck.uniformity_loss(x)):
        with pytest.raises(AssertionError, match="before the error"), NoWork(N * D):
            work()
    with NoWork(N * D):
        x.T, x[3:], x.detach(), x.new_zeros(3), x[0].sum()
