"""The optional C library of packed products; everything else is in pyproject.toml.

Without a compiler the package installs without it (`optional`), and packed models are computed
with plain torch. It is no Python extension (it knows nothing of Python and is loaded through
ctypes), but setuptools builds and places it as one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

FOLDER = Path("cptq", "inference", "native")
SOURCES = sorted(path.as_posix() for path in FOLDER.glob("*.c"))
HEADERS = sorted(path.as_posix() for path in FOLDER.glob("*.h"))
#: portable: instructions of the machine are chosen at run time
FLAGS = ["-std=c11", "-O3", "-g0"]


class BuildLibrary(build_ext):
    """Builds with OpenMP where the compiler has it, otherwise for one thread."""

    def build_extension(self, ext: Extension) -> None:
        if sys.platform == "win32":  # MSVC takes neither these flags nor this C
            raise CompileError("the C library of cptq is not built on Windows")
        ext.extra_compile_args = [*FLAGS, "-fopenmp"]
        ext.extra_link_args = ["-fopenmp"]
        try:
            super().build_extension(ext)
        except (CompileError, LinkError):
            ext.extra_compile_args, ext.extra_link_args = FLAGS, []
            super().build_extension(ext)


setup(
    cmdclass={"build_ext": BuildLibrary},
    ext_modules=[
        Extension(
            "cptq.inference.native._packed",
            sources=SOURCES,
            depends=HEADERS,
            libraries=[] if sys.platform == "win32" else ["m"],
            optional=True,
        )
    ],
)
