"""The examples of docstrings run as pasted, and give what they show."""

import doctest
import importlib
import importlib.util
import inspect
import pkgutil

import pytest

import contrastive_kernels as ck
from contrastive_kernels import diagnostics


def modules():
    for found in pkgutil.walk_packages(ck.__path__, "contrastive_kernels."):
        # __main__ prints on import; the Triton kernels need triton, and have no examples
        if (
            not found.name.endswith("__main__")
            and ".backends.triton." not in found.name
            and not found.name.endswith("._C")
        ):
            try:
                yield importlib.import_module(found.name)
            except ImportError:
                # an adapter whose classes derive from those of a library that is not installed
                assert found.name.startswith("contrastive_kernels.compat."), found.name
    yield ck


# An example runs as pasted: it imports what it uses.
EXAMPLES = {
    test.name: test for module in modules() for test in doctest.DocTestFinder().find(module, globs={}) if test.examples
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring(name):
    if all(example.options.get(doctest.SKIP) for example in EXAMPLES[name].examples):
        assert name.startswith("contrastive_kernels.compat."), "an example that does not run"
        pytest.skip("needs a library that is not installed")
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
