"""The C library: whether it was built, what it uses of the processor, and its calls.

Building this package from source builds the library too, if there is a C compiler (see
`setup.py`). It computes in the threads of the OpenMP library that torch computes with: a
second one would have threads of its own, and both would wait for cores that the other one holds.
"""

import ctypes
import functools
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

NAMES = ("none", "plain", "neon", "dotprod", "avx2", "avxvnni", "avx512vnni")
"""Sets of instructions, in the order of processor.h: none of any processor, ARM's, x86's."""

_TAKEN = {"DEFAULT": {"avx2", "avxvnni", "avx512vnni"}, "AVX2": {"avx512vnni"}}
"""By what torch may use of the processor, the sets that are not used either."""

_FILE = Path(__file__).with_name("kernels.so")
"""As setup.py has it built, for every version of Python and on every system."""

_OPENMP = re.compile(r"lib(g|i)?omp5?\b.*")
"""Names of OpenMP libraries: GCC's, LLVM's and Intel's."""

_STARTS = (
    ("GOMP_parallel",),
    ("__kmpc_fork_call", "__kmpc_push_num_threads", "__kmpc_global_thread_num"),
)
"""Functions that start threads, as threads.c calls them; on Windows there are but the latter."""

_ADDRESS, _COUNT, _SMALL, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "attend_tokens": (*[_ADDRESS] * 10, *[_REAL] * 2, *[_SMALL] * 2),
    "attend_chunk": (*[_ADDRESS] * 5, *[_REAL] * 2, _SMALL),
    "absorb_queries": (*[_ADDRESS] * 4, _SMALL),
    "latent_values": (*[_ADDRESS] * 4, _SMALL),
    "convolve": (*[_ADDRESS] * 6, _SMALL),
    "delta_rule": (*[_ADDRESS] * 9, _SMALL),
    "selective_update": (*[_ADDRESS] * 12, _SMALL),
    "replay": (_ADDRESS, _COUNT, *[_ADDRESS] * 3, _SMALL),
    "cut_probabilities": (*[_ADDRESS] * 3, *[_COUNT] * 3, _SMALL),
    "rms_norm": (*[_ADDRESS] * 3, *[_COUNT] * 2, _REAL, *[_SMALL] * 2),
    "pack_int8": (*[_ADDRESS] * 2, *[_COUNT] * 2, _SMALL),
    "pack_int4": (*[_ADDRESS] * 4, *[_COUNT] * 3, _REAL, _SMALL),
    "largest_magnitude": (_ADDRESS, _COUNT),
    "quantize_int8": (_ADDRESS, _SMALL, *[_COUNT] * 2, *[_ADDRESS] * 3, _SMALL),
    "quantize_int4": (_ADDRESS, _SMALL, *[_COUNT] * 2, *[_ADDRESS] * 3, _SMALL),
    "row_products": (*[_ADDRESS] * 3, _SMALL, *[_COUNT] * 2, *[_SMALL] * 2),
    "expert_products": (*[_ADDRESS] * 4, *[_COUNT] * 5, *[_SMALL] * 3),
    "int8_products": (*[_ADDRESS] * 3, _SMALL, *[_COUNT] * 2, *[_SMALL] * 3),
    "int4_products": (*[_ADDRESS] * 3, _SMALL, *[_COUNT] * 3, *[_SMALL] * 3),
}


class Missing(NotImplementedError):
    """This machine has no such library, or its processor none of the instructions it needs."""


@functools.cache
def instructions() -> str:
    """Return which of `NAMES` this process computes with.

    Respects ATEN_CPU_CAPABILITY, which takes instructions from torch, and is read once.
    """
    taken = _TAKEN.get(torch.backends.cpu.get_cpu_capability(), set())
    return [name for name in supported() if name not in taken][-1]


def supported() -> tuple[str, ...]:
    """Return those of `NAMES` that this processor has, "none" always among them, in their order."""
    library = _library()
    if library is None:
        return NAMES[:1]
    return tuple(name for at, name in enumerate(NAMES) if not at or library.has_instructions(at))


def loaded() -> ctypes.CDLL:
    """Return the library.

    Raises:
        Missing: see there.
    """
    library = _library()
    if library is None:
        raise Missing("the C library was not built for this machine")
    return library


class Product:
    """A function that multiplies by weights; its arguments are those in C but the last.

    Args:
        name: "int8_products", "int4_products", "row_products" or "expert_products".
        instructions: number in `NAMES`.

    Raises:
        Missing: see there.
    """

    def __init__(self, name: str, instructions: int) -> None:
        if not instructions:
            raise Missing("this processor has no instructions for fast products")
        self.name = name
        self.instructions = instructions
        self._function = getattr(loaded(), name)

    def __call__(self, *arguments: int) -> None:
        """Multiply.

        Raises:
            MemoryError: there is none for the states in another dtype.
        """
        if self._function(*arguments, self.instructions):
            raise MemoryError(f"no memory to convert states in for {self.name}")


@functools.cache
def function(name: str, instructions: str) -> Product:
    """Return the `Product` of this name, the same each time.

    Args:
        name: as it has.
        instructions: one of `NAMES`, which this processor has to have.

    Raises:
        Missing: see there.
    """
    return Product(name, NAMES.index(instructions))


@functools.cache
def _library() -> ctypes.CDLL | None:
    if not _FILE.exists():
        logger.warning(
            "The C library was not built when this package was installed: there was no C compiler. "
            "So torch's slower kernels are used. Install one, then this package again."
        )
        return None
    threads = _threads()
    if threads is None:
        logger.warning(
            "The OpenMP library that torch computes with was not found, or lacks functions that "
            "start threads, so torch's slower kernels are used."
        )
        return None
    return _opened(_FILE, threads)


def _opened(path: Path, threads: Sequence[int]) -> ctypes.CDLL | None:
    """Return the library, ready to be called.

    None if it cannot be loaded, or if this processor has none of the instructions that it uses.

    Args:
        path: of the library.
        threads: addresses of the functions that start threads; see `_STARTS`.
    """
    try:
        library = ctypes.CDLL(str(path))
        if not any(map(library.has_instructions, range(1, len(NAMES)))):
            return None
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
        library.largest_magnitude.restype = _REAL
        use = library.use_parallel if len(threads) == 1 else library.use_fork
        use.argtypes = [_ADDRESS] * len(threads)
        use(*threads)
    except (OSError, AttributeError) as exc:
        logger.warning(
            "%s cannot be used (%s), so torch's kernels are. Install this package again.",
            *(path, exc),
        )
        return None
    return library


def _threads() -> Sequence[int] | None:
    """Return the addresses of what starts the threads of torch's OpenMP library; None: unknown."""
    for path in [*_loaded(Path("/proc/self/maps")), *_beside_torch()]:
        for names in _STARTS:
            try:
                library = ctypes.CDLL(path)  # it is loaded; this finds it
                starts = [ctypes.cast(getattr(library, name), _ADDRESS).value for name in names]
            except (OSError, AttributeError):
                continue
            return [address for address in starts if address is not None]
    return None


def _loaded(maps: Path) -> list[str]:
    """Return the OpenMP libraries that this process has loaded, by Linux's list of its memory."""
    if not maps.exists():
        return []
    paths = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines()}
    return sorted(path for path in paths if _OPENMP.fullmatch(Path(path).name))


def _beside_torch() -> list[str]:
    return [str(path) for path in sorted(Path(torch.__file__).parent.glob("lib/lib*omp*"))]


def check_width(states: Tensor, width: int) -> None:
    """Refuse states that are not as wide as the weight: C would read or write beyond their memory.

    Raises:
        ValueError: they are not.
    """
    if states.shape[-1] != width:
        raise ValueError(f"states of {states.shape[-1]} numbers and a weight of {width} do not fit")
