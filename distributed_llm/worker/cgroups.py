"""The control groups that this process is in, which limit what it may use; Linux only."""

from collections.abc import Iterator
from pathlib import Path

UNIFIED = ""
"""Name of the controller of the hierarchy in which one folder has the limits of all kinds."""


def folders(root: Path, controller: str) -> Iterator[tuple[str, Path]]:
    """Yield the folders that may limit this process, innermost first, with whose they are.

    Args:
        root: of the file system.
        controller: such as "memory".

    Yields:
        `UNIFIED` or the controller, and the folder.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            kind, mount = UNIFIED, root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            kind, mount = controller, root / "sys/fs/cgroup" / controller
        else:
            continue
        own = mount / path.lstrip("/")
        for folder in [own, *own.parents]:
            if not folder.is_relative_to(mount):
                break
            yield kind, folder


def read_int(path: Path) -> int | None:
    """Return the number in a file; None without such a file, or if it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
