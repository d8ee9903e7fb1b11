"""What pyproject.toml has no settled words for: the C library that the package builds."""

from pathlib import Path

from setuptools import Extension, setup

_FOLDER = Path("distributed_llm/worker/model/kernels/native")

# A plain library, called through ctypes. Without a C compiler all the rest is installed, and
# torch's slower kernels are used.
setup(
    ext_modules=[
        Extension(
            "distributed_llm.worker.model.kernels.native.kernels",
            sorted(path.as_posix() for path in _FOLDER.glob("*.c")),
            depends=sorted(path.as_posix() for path in _FOLDER.glob("*.h")),
            extra_compile_args=["-O3", "-std=c11", "-fvisibility=hidden"],
            optional=True,
        )
    ]
)
