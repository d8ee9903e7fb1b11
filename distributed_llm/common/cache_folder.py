"""Where this user's machines keep what can be had or made again."""

import os
from pathlib import Path

import platformdirs

CACHE_VARIABLE = "DLLM_CACHE"
"""Environment variable that names another folder for weights."""


def cache_folder() -> Path:
    """Return where this user keeps weights, and texts of models, on this machine."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else platformdirs.user_cache_path("distributed_llm")


def offload_folder() -> Path:
    """Return where workers keep layers that do not fit into their memory, while they run."""
    return cache_folder() / "offload"
