"""Replaced attributes come back exactly, whatever the order in which patches are undone."""

import copy
import gc
import itertools
import types
import weakref

import pytest
from torch import nn

from contrastive_kernels.compat import Patch


class Base:
    kept = "base"

    @staticmethod
    def function():
        return "base"


class Derived(Base):
    pass


def test_undo_puts_back_what_was_there():
    original = vars(Base)["function"]
    patch = Patch((Base, "function", staticmethod(lambda: "new")), (Base, "kept", "new"))
    assert (Base.function(), Base.kept, Derived.kept) == ("new", "new", "new")
    patch.undo()
    # the descriptor itself, not what an access gives
    assert vars(Base)["function"] is original
    assert Base.kept == "base"


def test_undo_any_number_of_times():
    patch = Patch((Base, "kept", "new"))
    patch.undo()
    patch.undo()
    assert Base.kept == "base"
    # nor does it touch a patch that came after
    with Patch((Base, "kept", "later")):
        patch.undo()
        assert Base.kept == "later"
    assert Base.kept == "base"


def test_what_was_inherited_is_inherited_again():
    with Patch((Derived, "kept", "new")):
        assert (Derived.kept, Base.kept) == ("new", "base")
    assert "kept" not in vars(Derived)
    assert Derived.kept == "base"


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_nested_patches(order):
    """The latest patch that is in force decides; after the last one is undone the original is there."""
    patches = [Patch((Base, "kept", number)) for number in range(3)]
    left = set(range(3))
    for number in order:
        patches[number].undo()
        left.discard(number)
        assert Base.kept == (max(left) if left else "base")
    assert Base.kept == "base"
    assert Base not in Patch._in_force


def test_nested_patches_undone_early_leave_the_later():
    first, second = Patch((Base, "kept", 1)), Patch((Base, "kept", 2))
    first.undo()
    assert Base.kept == 2
    second.undo()
    assert Base.kept == "base"


def test_nested_patches_undone_in_reverse():
    first = Patch((Base, "kept", 1))
    second = Patch((Base, "kept", 2))
    second.undo()
    assert Base.kept == 1
    first.undo()
    assert Base.kept == "base"


def test_one_attribute_twice_in_a_patch():
    with Patch((Base, "kept", 1), (Base, "kept", 2)):
        assert Base.kept == 2
    assert Base.kept == "base"


def test_with_block_that_raises():
    def fail():
        with Patch((Base, "kept", "new")) as patch:
            assert isinstance(patch, Patch)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert Base.kept == "base"


def test_all_or_nothing():
    """A replacement that is refused takes back those before it."""
    with pytest.raises(TypeError):
        Patch((Base, "kept", "new"), (int, "bit_length", None))
    assert Base.kept == "base"
    assert Base not in Patch._in_force


def test_deleted_by_others():
    patch = Patch((Derived, "kept", "new"))
    del Derived.kept
    patch.undo()
    assert Derived.kept == "base"


def test_module():
    module = types.ModuleType("module")
    module.there = 1
    with Patch((module, "there", 2), (module, "absent", 3)):
        assert (module.there, module.absent) == (2, 3)
    assert module.there == 1
    assert not hasattr(module, "absent")


def test_instance_of_a_module_class():
    """Only that instance; a copy of it has the replacement, bound to itself."""
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    patch = Patch((model, "forward", types.MethodType(lambda self, x: self, model)))
    twin = copy.deepcopy(model)
    assert model(None) is model
    assert twin(None) is twin
    assert "forward" not in vars(other)
    patch.undo()
    assert "forward" not in vars(model)
    assert twin(None) is twin


def test_patched_object_is_freed():
    """Who loses the handle does not keep the object."""
    model = nn.Linear(2, 2)
    reference = weakref.ref(model)
    patch = Patch((model, "forward", types.MethodType(lambda self, x: x, model)))
    del model
    gc.collect()
    assert reference() is None
    patch.undo()
