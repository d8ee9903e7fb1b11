"""What every test of models needs."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from distributed_llm.common.checkpoint import Checkpoint, open_checkpoint

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    """Use one thread, for speed with tiny matrices, and draw no progress bars."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, which a test's own module makes."""
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    """The model in `folder`, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
