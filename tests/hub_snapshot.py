"""A model in the hub's cache on this machine, as its library leaves it; nothing is downloaded."""

import shutil
from pathlib import Path

NAME = "org/tiny"
COMMIT = "c0ffee" * 6 + "1234"


def write_snapshot(hub_cache: Path, checkpoint: Path) -> Path:
    """Copy a checkpoint to the hub's cache, and return its folder there."""
    repository = hub_cache / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(checkpoint, repository / "snapshots" / COMMIT))
