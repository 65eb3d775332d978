"""Everything is in setup.cfg but this: VIT_ADAPTER_BUILD=1 lets a wheel carry the native kernels, built here.

    VIT_ADAPTER_BUILD=1 pip wheel . --no-deps --no-build-isolation

Without isolation, because the kernels are built for the PyTorch that is installed; another one builds its own.
"""

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

CARRIES_KERNELS = os.environ.get("VIT_ADAPTER_BUILD") == "1"


class BuildWithKernels(build_py):
    """Copies the package, then builds the kernels into the copy."""

    def run(self) -> None:
        super().run()
        if CARRIES_KERNELS and not self.editable_mode:
            sys.path.insert(0, str(Path(__file__).parent))
            from vit_adapter.kernels import native

            native.build_for_wheel(Path(self.build_lib) / "vit_adapter" / "kernels" / "lib")


class PlatformDistribution(Distribution):
    """A wheel with native code is for one platform only."""

    def has_ext_modules(self) -> bool:
        return CARRIES_KERNELS


setup(cmdclass={"build_py": BuildWithKernels}, distclass=PlatformDistribution)
