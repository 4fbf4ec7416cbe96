"""A loss lists its keyword arguments once as a function and once as types; its module shows them all."""

import inspect
import pydoc
import sys
import typing

import pytest

import contrastive_kernels as ck
from contrastive_kernels.losses._module import KeyQueue, LossModule

MODULES = [
    value
    for value in vars(ck).values()
    if inspect.isclass(value) and issubclass(value, LossModule) and isinstance(vars(value)["function"], staticmethod)
]
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)


def keywords(function):
    return {p.name: p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def own_arguments(module):
    """Return the named arguments of the constructor itself."""
    parameters = list(inspect.signature(module.__init__).parameters.values())[1:]
    return {p.name: p for p in parameters if p.kind is not p.VAR_KEYWORD}


def options_of(module):
    """Return the types of the further options, by name."""
    (arguments,) = typing.get_args(typing.get_type_hints(module.__init__)["options"])
    return typing.get_type_hints(arguments)


def test_every_loss_has_a_module():
    functions = {value for name, value in vars(ck).items() if name.endswith("_loss") or name == "distance_polarization"}
    assert {module.function for module in MODULES} == functions


@each_module
def test_options_are_the_arguments_of_the_function(module):
    """The names and the types, and the defaults of those that the constructor names itself."""
    function, own = module.function, own_arguments(module)
    queue = {"dim", "queue_size"} if issubclass(module, KeyQueue) else set()
    assert set(own) - queue | set(options_of(module)) == set(keywords(function))
    types, constructor = typing.get_type_hints(function), typing.get_type_hints(module.__init__)
    for name, kind in options_of(module).items():
        assert kind == types[name], name
    for name in set(own) - queue:
        assert constructor[name] == types[name], name
        assert own[name].default == keywords(function)[name].default, name


@each_module
def test_the_constructor_shows_every_option(module):
    shown = inspect.signature(module).parameters
    assert set(shown) == set(own_arguments(module)) | set(keywords(module.function))
    text = pydoc.plain(pydoc.render_doc(module))
    assert all(f"{name}: " in text for name in shown)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="overloads are not recorded before Python 3.11")
@each_module
def test_overloads_are_the_function(module):
    """Each has the arguments of the function; one for each type of `return_stats`, which decides what is returned."""
    function = module.function
    overloads = typing.get_overloads(function)
    assert len(overloads) == (3 if "return_stats" in keywords(function) else 0)
    for overload in overloads:
        parameters = inspect.signature(overload).parameters
        named = {name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
        (arguments,) = typing.get_args(typing.get_type_hints(overload)["options"])
        assert named | set(typing.get_type_hints(arguments)) == set(inspect.signature(function).parameters)
