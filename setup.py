"""Builds the C++ backend where it can be built; the metadata is in pyproject.toml.

``CONTRASTIVE_KERNELS_BUILD=0`` leaves the extension out; ``=1`` makes a failure to build it an error, not a message.
"""

import os
import sys

from setuptools import setup

CHOICE = os.environ.get("CONTRASTIVE_KERNELS_BUILD", "")
SOURCES = [
    "checks.cpp",
    "extension.cpp",
    "products.cpp",
    "rows.cpp",
    "schedule.cpp",
    "select.cpp",
    "sweep.cpp",
    "tile/tile_math.cpp",
    "views.cpp",
]
# Changing one of these compiles the extension again.
HEADERS = [
    "checks.h",
    "operators.h",
    "products.h",
    "schedule.h",
    "tile/backward.inc",
    "tile/exponential.inc",
    "tile/forward.inc",
    "tile/log_sum_exp.inc",
    "tile/masks.inc",
    "tile/rounding.inc",
    "tile/rows.inc",
    "tile/select.inc",
    "tile/terms.inc",
    "tile/tile_math.h",
    "tile/tile_math.inc",
    "tile/weights.inc",
]


def extension():
    """The keyword arguments of ``setup`` that build the extension."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class OptionalBuild(BuildExtension):
        """Leaves the extension out, and says so, where it does not compile."""

        def run(self):
            try:
                super().run()
            except Exception as error:
                if CHOICE == "1":
                    raise
                without(f"it did not compile: {error}")
                self.extensions = []

    standard = "c++20" if torch.__version__ >= torch.torch_version.TorchVersion("2.10") else "c++17"
    # -O2 with the vectoriser of -O3: the rest of -O3 makes the loops a fifth slower. Comparisons of NaN may not trap,
    # or the compiler could not vectorise them.
    flags = [f"-std={standard}", "-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic"]
    flags += ["-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
    flags += os.environ.get("CONTRASTIVE_KERNELS_CXXFLAGS", "").split()
    module = CppExtension(
        "contrastive_kernels._C",
        [f"csrc/{source}" for source in SOURCES],
        depends=[f"csrc/{header}" for header in HEADERS],
        extra_compile_args=flags,
        extra_link_args=["-fopenmp", *os.environ.get("CONTRASTIVE_KERNELS_LDFLAGS", "").split()],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": OptionalBuild}}


def without(reason):
    print(f"contrastive_kernels: installing without the C++ backend, {reason}", file=sys.stderr)
    return {}


def arguments():
    if CHOICE == "0":
        return without("as CONTRASTIVE_KERNELS_BUILD=0 asks")
    try:
        return extension()
    except ImportError as error:
        if CHOICE == "1":
            raise
        return without(f"torch is not there to build against: {error}")


setup(**arguments())
