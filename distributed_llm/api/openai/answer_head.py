"""What all parts of an answer say of it."""

import hashlib
import time
from dataclasses import dataclass
from typing import Any

from distributed_llm.client.session import new_request_id


@dataclass(frozen=True)
class AnswerHead:
    """What all parts of an answer say of it.

    Attributes:
        id: of the answer.
        created: seconds since 1970.
        model: name of the model.
        fingerprint: stands for whatever may change an answer besides the request.
    """

    id: str
    created: int
    model: str
    fingerprint: str

    def fields(self, kind: str) -> dict[str, Any]:
        """Return the fields with which a body begins."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def new_head(prefix: str, model: str, fingerprint: str) -> AnswerHead:
    """Return the head of a new answer.

    Args:
        prefix: with which its id begins.
    """
    return AnswerHead(f"{prefix}-{new_request_id()}", int(time.time()), model, fingerprint)


def fingerprint_of(model: str, epoch: int) -> str:
    """Return what stands for a model, and for how its layers are shared out."""
    digest = hashlib.sha256(f"{epoch} {model}".encode()).hexdigest()
    return f"fp_{digest[:12]}"
