"""The examples of docstrings and documents run, and give what they show."""

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re

import pytest
import torch

import contrastive_kernels as ck
from contrastive_kernels import diagnostics
from tests.support.testing import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def modules():
    for found in pkgutil.walk_packages(ck.__path__, "contrastive_kernels."):
        # __main__ prints on import; the Triton kernels need triton, and have no examples
        if (
            not found.name.endswith("__main__")
            and ".backends.triton." not in found.name
            and not found.name.endswith("._C")
        ):
            yield importlib.import_module(found.name)
    yield ck


# An example runs as pasted: it imports what it uses.
EXAMPLES = {
    test.name: test for module in modules() for test in doctest.DocTestFinder().find(module, globs={}) if test.examples
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring(name):
    report = []
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(EXAMPLES[name], out=report.append)
    assert results.attempted
    assert not results.failed, "".join(report)


def public(module):
    return [getattr(module, name) for name in module.__all__ if callable(getattr(module, name))]


@pytest.mark.parametrize("function", [f for f in public(ck) if inspect.isfunction(f)], ids=lambda f: f.__name__)
def test_every_public_function_has_a_docstring_with_an_example(function):
    name = f"{function.__module__}.{function.__name__}"
    limits = function.__module__.endswith(".limits")
    assert limits or name in EXAMPLES, f"{name} has no example"


@pytest.mark.parametrize("thing", [*public(ck), *public(diagnostics)], ids=lambda f: f.__name__)
def test_everything_public_is_described(thing):
    """By a docstring of its own, which a dataclass or a NamedTuple would otherwise generate."""
    assert thing.__doc__
    assert not thing.__doc__.startswith(f"{thing.__name__}(")


# Documents


def features(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1).requires_grad_()


def namespace():
    """Return the names that the examples of the documents leave to the reader."""
    names = {name: features(12, 8) for name in ("z0", "z1", "image", "text", "image_features", "text_features")}
    names |= {name: features(12, 8) for name in ("q", "k", "a", "b", "out0", "out1", "query", "positive", "negatives")}
    scale = torch.tensor(2.0, requires_grad=True)
    return names | {
        "torch": torch,
        "ck": ck,
        "log_scale": scale,
        "logit_scale": scale.exp(),
        "features": features(12, 2, 8),
        "labels": torch.arange(12) % 4,
        "T": 0.1,
        "dim": 8,
        "queue_size": 48,
    }


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if BLOCK.search(p.read_text())], ids=lambda p: p.name)
def test_document(path):
    names = namespace()
    for block in BLOCK.findall(path.read_text()):
        exec(compile(block, path.name, "exec"), names)


def test_readme_loss_is_the_decoupled_loss():
    names = namespace()
    for block in BLOCK.findall((ROOT / "README.md").read_text()):
        exec(compile(block, "README.md", "exec"), names)
    z0, z1 = names["z0"], names["z1"]
    torch.testing.assert_close(names["decoupled_loss"](z0, z1), ck.decoupled_loss(z0, z1, temperature=0.1))


def test_readme_migration_table():
    """The right column runs."""
    table = re.search(r"^## Migrating\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL).group(1)
    calls = re.findall(r"\| `(ck\.[^`]*)`[^|]* \|$", table, re.MULTILINE)
    assert len(calls) >= 5
    for call in calls:
        assert eval(call, namespace()).isfinite().all(), call
