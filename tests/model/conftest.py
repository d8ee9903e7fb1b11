"""What every test of models needs."""

import os

import pytest
import torch
from transformers.utils import logging as transformers_logging

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    """Use one thread, for speed with tiny matrices, and draw no progress bars."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
