"""A process that says whether a checkpoint could be loaded, as `coordinator.loadable` asks it.

The question comes on stdin, and the answer goes to stdout. What libraries print goes to stderr.
"""

import json
import os
import sys

import msgspec

from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.coordinator.loadable import Asked, Verdict, as_json


def verdict(question: bytes) -> Verdict:
    """Return what is to be said of the checkpoint that `question` tells of."""
    from distributed_llm.worker.model.stage import Stage  # loads torch

    try:
        Stage.check_loading(msgspec.convert(json.loads(question), Asked).checkpoint)
    except DistributedLLMError as exc:
        return Verdict(exc.code, str(exc))
    return Verdict()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        answer.write(as_json(verdict(sys.stdin.buffer.read())))
