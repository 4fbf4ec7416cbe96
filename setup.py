"""Build the C++ backend, if torch and a compiler are there. The metadata is in pyproject.toml.

``CONTRASTIVE_KERNELS_BUILD=0`` leaves the extension out; ``=1`` turns a failed build from a message into an error.
``CONTRASTIVE_KERNELS_CXXFLAGS`` and ``CONTRASTIVE_KERNELS_LDFLAGS`` add flags.
"""

import os
import sys

from setuptools import setup

BUILD = os.environ.get("CONTRASTIVE_KERNELS_BUILD", "")
SOURCES = [
    "build_info.cpp",
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
# A change in one of these compiles the extension again.
HEADERS = [
    "build_info.h",
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
    """Return the keyword arguments of ``setup`` that build the extension."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class OptionalBuild(BuildExtension):
        """Leave the extension out, with a message, if it does not compile."""

        def finalize_options(self):
            super().finalize_options()
            # setuptools compares the dates of csrc alone; ninja also sees another torch.
            self.force = self.force or self.use_ninja

        def run(self):
            try:
                super().run()
            except Exception as error:
                if BUILD == "1":
                    raise
                without(f"it did not compile: {error}")
                self.extensions = []

    # The headers of torch 2.10 and later are C++20. For an earlier torch C++17 has to do, which has no designated
    # initialisers, but GCC and Clang accept them there.
    standard = "c++20" if torch.__version__ >= torch.torch_version.TorchVersion("2.10") else "c++17"
    # -O2 with the vectoriser of -O3: the rest of -O3 makes the loops a fifth slower. A comparison with NaN must not
    # trap, or the compiler could not vectorise it.
    flags = [f"-std={standard}", "-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic"]
    flags += ["-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
    flags += os.environ.get("CONTRASTIVE_KERNELS_CXXFLAGS", "").split()
    module = CppExtension(
        "contrastive_kernels._C",
        [f"csrc/{source}" for source in SOURCES],
        depends=[f"csrc/{header}" for header in HEADERS],
        include_dirs=pybind11_folders(),
        extra_compile_args=flags,
        extra_link_args=["-fopenmp", *os.environ.get("CONTRASTIVE_KERNELS_LDFLAGS", "").split()],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": OptionalBuild}}


def pybind11_folders():
    """Return the folder of pybind11's headers, or no folder if only torch's copy of them is there."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


def without(reason):
    """Print why the extension is left out; return the keyword arguments of ``setup`` for that."""
    print(f"contrastive_kernels: installing without the C++ backend, {reason}", file=sys.stderr)
    return {}


def arguments():
    """Return the keyword arguments of ``setup``."""
    if BUILD == "0":
        return without("as CONTRASTIVE_KERNELS_BUILD=0 asks")
    try:
        return extension()
    except ImportError as error:
        if BUILD == "1":
            raise
        return without(f"torch cannot be imported: {error}")


setup(**arguments())
