"""What fetching says to people: what it waits for, and why it has to give up. Pure."""

from collections.abc import Sequence

from distributed_llm.common.wording import count_text, list_text
from distributed_llm.weights.fetching.book import Book
from distributed_llm.weights.fetching.tensor import Tensor, TensorState

_MOST_NAMED = 5
"""Tensors or sources that a text names."""


def waits_for_text(book: Book, now: float) -> str:
    """Return what keeps bytes from coming; empty if nothing does."""
    lacking = book.lacking()
    if not lacking:
        return _waits_for_this_machine_text(book)
    for tensor in lacking:
        if tensor.only:
            return f"wrong bytes in {tensor.wanted.name}: all of it again from {tensor.only}"
    if any(link.may_give(t.wanted.sha256, now) for t in lacking for link in book.heard()):
        return ""
    names = [
        name
        for name, link in book.links.items()
        if any(link.may_hold(tensor.wanted.sha256) for tensor in lacking)
    ]
    return f"waits for {_names_text(names, 'other source') if names else 'a source'}"


def _waits_for_this_machine_text(book: Book) -> str:
    states = [tensor.state for tensor in book.open.values()]
    if TensorState.OPEN in states:
        return "waits for the disk"
    if TensorState.CHECKING in states:
        return "checks hashes"
    if book.busy:
        return f"another process of this machine fetches {count_text(len(book.busy), 'tensor')}"
    return "waits to be told of more tensors" if book.all_done else ""


def tensors_text(tensors: Sequence[Tensor]) -> str:
    """Return the names of tensors, of which there is at least one."""
    return _names_text([tensor.wanted.name for tensor in tensors], "other tensor")


def _names_text(names: Sequence[str], noun: str) -> str:
    more = len(names) - _MOST_NAMED
    others = [count_text(more, noun)] if more > 0 else []
    return list_text([*names[:_MOST_NAMED], *others])


def tried_text(book: Book, tensor: Tensor) -> str:
    """Return in a sentence who was tried for a tensor, and why each did not do."""
    sha256 = tensor.wanted.sha256
    tried = [f"{name} ({link.why_not(sha256)})" for name, link in book.links.items()]
    return f"Tried: {', '.join(tried)}." if tried else "There was no source."
