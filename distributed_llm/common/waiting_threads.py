"""How long OpenMP's threads wait actively for more work. Imports nothing, for it comes first."""

from collections.abc import MutableMapping


def limit_active_waiting(environment: MutableMapping[str, str]) -> None:
    """Let threads wait actively for the next product of a step, but not for the next step.

    Other workers may compute on these cores meanwhile. Each OpenMP reads its own variable when
    torch loads it: GNU's counts turns (0.1 ms), those of LLVM and Intel milliseconds; they would
    wait 200. What is set already stays.
    """
    environment.setdefault("GOMP_SPINCOUNT", "10000")
    environment.setdefault("KMP_BLOCKTIME", "1")
