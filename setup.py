"""What pyproject.toml has no settled words for: the C library that the package builds."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

_FOLDER = Path("distributed_llm/worker/model/kernels/native")

_MICROSOFT = ["/O2", "/std:c11", "/experimental:c11atomics"]
"""For Microsoft's compiler, which lets functions use any instructions without being told."""

_OTHERS = ["-O3", "-std=c11", "-fvisibility=hidden", "-ffp-contract=off"]
"""For GCC and Clang. The last one lets no compiler round less often than is written."""


class BuildLibrary(build_ext):
    """Builds a library that ctypes loads: one file for all versions of Python."""

    def build_extension(self, ext: Extension) -> None:
        """Build it with the flags of the compiler that was found."""
        microsoft = self.compiler.compiler_type == "msvc"
        ext.extra_compile_args = _MICROSOFT if microsoft else _OTHERS
        super().build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        """Return its file, which library.py looks for: of the same name on all systems."""
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Return what Windows' linker is told to export beside what the files do: nothing."""
        return []


class TagWheel(bdist_wheel):
    """Tags a wheel for its platform, and for any Python there."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of Python, of its binary interface, and of the platform."""
        return "py3", "none", super().get_tag()[2]


# Without a C compiler all the rest is installed, and torch's slower kernels are used.
setup(
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": TagWheel},
    ext_modules=[
        Extension(
            "distributed_llm.worker.model.kernels.native.kernels",
            sorted(path.as_posix() for path in _FOLDER.glob("*.c")),
            depends=sorted(path.as_posix() for path in _FOLDER.glob("*.h")),
            optional=True,
        )
    ],
)
