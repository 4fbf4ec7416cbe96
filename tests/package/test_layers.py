"""Imports point one way: losses, then primitives, then the engine, then its backends. The package reaches all."""

import ast
import subprocess
import sys

import pytest

from tests.support.testing import ROOT

NAME = "contrastive_kernels"
PACKAGE = ROOT / NAME
ENGINE = f"{NAME}.engine"
# What the backends share: the description of a sweep, the limits, variables and warnings.
OF_BACKENDS = tuple(f"{ENGINE}.{module}" for module in ("backends", "environment", "limits", "spec", "terms", "warn"))

# The modules of each layer, the longest matching prefix first, and what they may import of the package.
LAYERS = {
    f"{ENGINE}.backends": OF_BACKENDS,
    ENGINE: (ENGINE,),
    f"{NAME}.primitives": (f"{NAME}.primitives", ENGINE),
    f"{NAME}.losses": (f"{NAME}.losses", f"{NAME}.primitives"),
    f"{NAME}.diagnostics": (f"{NAME}.diagnostics", f"{NAME}.losses", f"{NAME}.primitives"),
    NAME: (NAME,),
}
# Packages besides torch, which brings typing_extensions, and the modules that may import them.
THIRD_PARTY = {
    f"{NAME}.diagnostics.plots": {"matplotlib"},
    f"{ENGINE}.backends.triton": {"triton"},
    f"{ENGINE}.backends.cpp.build": {"setuptools", "pybind11"},
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def within(module, prefixes):
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def imports(source):
    """Return all modules that a source imports, those inside functions too, each by its full name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides its layer"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def violations(module, source):
    layer = next(prefix for prefix in LAYERS if within(module, [prefix]))
    extra = {name for prefix, names in THIRD_PARTY.items() if within(module, [prefix]) for name in names}
    for imported in imports(source):
        root = imported.partition(".")[0]
        if root == NAME:
            if not within(imported, LAYERS[layer]):
                yield imported
        elif root not in {"torch", "typing_extensions", *extra, *sys.stdlib_module_names}:
            yield imported


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    assert list(violations(module, MODULES[module].read_text())) == []


def test_every_layer_has_modules():
    for layer in LAYERS:
        assert sum(within(module, [layer]) for module in MODULES) > 1, layer


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("losses.clip", "from contrastive_kernels.engine.spec import compute_dtype"),
        ("losses.clip", "from contrastive_kernels import engine"),
        ("losses.clip", "import contrastive_kernels"),
        ("losses.clip", "def f():\n    import contrastive_kernels.engine.limits"),
        ("losses.clip", "import numpy"),
        ("primitives.sums", "from contrastive_kernels.losses.clip import clip_loss"),
        ("engine.autograd", "from contrastive_kernels.primitives import sweep"),
        ("engine.backends.torch", "from contrastive_kernels.engine.operators import operator"),
        ("engine.backends.torch", "import triton"),
        ("diagnostics.classes", "from contrastive_kernels.engine import limits"),
        ("diagnostics.classes", "import matplotlib.pyplot as plt"),
    ],
)
def test_a_violation_is_found(module, source):
    assert len(list(violations(f"{NAME}.{module}", source))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("losses.clip", "from contrastive_kernels.losses import _softmax\nfrom contrastive_kernels import primitives"),
        (
            "losses.clip",
            "import math\nimport torch.nn.functional as F\nfrom contrastive_kernels.primitives import rows",
        ),
        ("engine.backends.triton.launch", "import triton.language as tl\nfrom contrastive_kernels.engine import spec"),
        ("__init__", "from contrastive_kernels.engine import limits"),
    ],
)
def test_what_is_allowed(module, source):
    assert list(violations(f"{NAME}.{module}", source)) == []


FRESH = """
import sys
import contrastive_kernels as ck
assert {"compat", "diagnostics", "distributed"} <= set(dir(ck))
print(ck.compat.patch_open_clip.__name__, ck.diagnostics.alignment.__name__, ck.distributed.set_shards.__name__)
print(*{"matplotlib", "pandas", "setuptools", "lightly", "open_clip", "torch._dynamo", "sympy"} & set(sys.modules))
"""


def test_one_import_reaches_the_subpackages_and_no_other_library():
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, cwd=ROOT)
    assert (done.stderr, done.stdout) == ("", "patch_open_clip alignment set_shards\n\n")
