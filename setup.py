"""Build the C++ backend, if torch and a compiler are there. The metadata is in pyproject.toml.

``CONTRASTIVE_KERNELS_BUILD=0`` leaves the extension out; ``=1`` turns a failed build from a message into an error.
``CONTRASTIVE_KERNELS_CXXFLAGS`` and ``CONTRASTIVE_KERNELS_LDFLAGS`` add flags.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent


def module(name):
    """Return a module of the engine, without importing the package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"contrastive_kernels/engine/{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


environment = module("environment")
BUILD = environment.choice("CONTRASTIVE_KERNELS_BUILD", environment.SWITCH)


def extension():
    """Return the keyword arguments of ``setup`` that build the extension."""
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuild(BuildExtension):
        """Leave the extension out, with a message, if it does not compile."""

        def finalize_options(self):
            super().finalize_options()
            # setuptools compares the dates of the sources alone; ninja also sees another torch.
            self.force = self.force or self.use_ninja

        def run(self):
            try:
                super().run()
            except Exception as error:
                if BUILD == "1":
                    raise
                without(f"it did not compile: {error}")
                self.extensions = self.distribution.ext_modules = []

    class Wheel(bdist_wheel):
        """Name the wheel after what it holds: one without the extension serves every Python and platform."""

        def run(self):
            self.run_command("build_ext")
            self.root_is_pure = not self.distribution.ext_modules
            super().run()

    return {
        "ext_modules": [module("backends/cpp/build").extension_module(ROOT)],
        "cmdclass": {"build_ext": OptionalBuild, "bdist_wheel": Wheel},
    }


def without(reason):
    """Print why the extension is left out; return the keyword arguments of ``setup`` for that."""
    print(
        f"contrastive_kernels: installing without the C++ backend, {reason}. "
        "`python -m contrastive_kernels build` builds it later.",
        file=sys.stderr,
    )
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
