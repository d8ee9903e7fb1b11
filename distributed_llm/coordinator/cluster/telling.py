"""What workers are told for the people who look at their terminals. Pure."""

from distributed_llm.common.messages import Notice
from distributed_llm.coordinator.cluster.worker import Worker
from distributed_llm.coordinator.events import Action, Send

_MAX_CHARS = 1000
"""Characters of a notice; the rest is cut off."""


def tell(worker: Worker, text: str) -> list[Action]:
    """Return the message that tells a worker something, unless it was what it was told last."""
    if worker.told == text:
        return []
    worker.told = text
    return [Send(worker.peer, Notice(text=text[:_MAX_CHARS]))]
