"""What a cache of weights holds, for people. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from distributed_llm.weights.cache.eviction import Kept
from distributed_llm.weights.cache.notes import Note


@dataclass(frozen=True)
class KeptModel:
    """A model of which there are entries.

    Attributes:
        name: as it was noted.
        kept_bytes: of its complete entries, also of those that other models have as well.
        total_bytes: of all of its entries.
        used_at: when one of them was last used, seconds since 1970.
    """

    name: str
    kept_bytes: int
    total_bytes: int
    used_at: float


@dataclass(frozen=True)
class Contents:
    """What a cache holds.

    Attributes:
        models: most lately used first.
        total_bytes: of all files.
        unknown_bytes: of complete entries that belong to no model that was noted.
        partial_bytes: of entries that are not complete.
    """

    models: tuple[KeptModel, ...]
    total_bytes: int
    unknown_bytes: int
    partial_bytes: int


def contents_of(kept: Iterable[Kept], notes: Sequence[Note]) -> Contents:
    """Return what a cache holds.

    Args:
        kept: all of its files.
        notes: on the models that are known.
    """
    files = list(kept)
    complete = {one.sha256: one for one in files if not one.is_part}
    models = [model for note in notes if (model := _kept_model(note, complete))]
    known = {name for note in notes for name in note.tensors}
    return Contents(
        models=tuple(sorted(models, key=lambda model: -model.used_at)),
        total_bytes=sum(one.nbytes for one in files),
        unknown_bytes=sum(one.nbytes for name, one in complete.items() if name not in known),
        partial_bytes=sum(one.nbytes for one in files if one.is_part),
    )


def _kept_model(note: Note, complete: Mapping[str, Kept]) -> KeptModel | None:
    """Return what there is of a model; None if there is nothing."""
    here = [complete[name] for name in note.tensors if name in complete]
    if not here:
        return None
    return KeptModel(
        name=note.name,
        kept_bytes=sum(one.nbytes for one in here),
        total_bytes=sum(note.tensors.values()),
        used_at=max(one.used_at for one in here),
    )
