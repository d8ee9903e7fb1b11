"""How many files and connections a process may have open."""

import contextlib


def raise_file_limit() -> None:
    """Let this process open as many connections as the system allows."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on Windows
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
