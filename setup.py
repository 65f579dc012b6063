"""Build the native kernel with the package. The rest is in pyproject.toml.

Without a C compiler the package is built all the same, and torch does the sums. The library has no
Python API, so one wheel serves every version of Python on a platform.
"""

import importlib.util
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDER = Path("merge_cli/engine/kernels")


def kernel_build() -> Any:
    """The module `build.py`, without importing the package around it."""
    spec = importlib.util.spec_from_file_location("kernel_build", FOLDER / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernel(build_ext):
    """Compiles the library by `build.py`; a failure is a warning, since the extension is optional."""

    def get_ext_filename(self, fullname: str) -> str:
        return "/".join(fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        build = kernel_build()
        try:
            build.build(Path(self.get_ext_fullpath(ext.name)))
        except build.BuildError as error:
            raise CompileError(f"pmerge runs without its native kernel, on torch: {error}") from error


class Wheel(bdist_wheel):
    """Tags the wheel for the platform, or for any where the kernel was not built."""

    def get_tag(self) -> tuple[str, str, str]:
        is_built = any(Path(self.bdist_dir).rglob("average.so"))
        return "py3", "none", super().get_tag()[2] if is_built else "any"


setup(
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": Wheel},
    ext_modules=[
        Extension("merge_cli.engine.kernels.average", [str(FOLDER / "average.c"), str(FOLDER / "table.c")], optional=True)
    ],
)
