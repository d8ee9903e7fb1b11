"""Finds the tensors of the text model among those of a model for text and pictures or sound. Pure.

Such models hold a text model under a name of its own ("language_model.model.layers.0...",
"model.language_model.layers.0...", "model.text_model.layers.0..."), or beside the other parts
("model.layers.0..." beside "visual.blocks.0..."). Whether what is found is the text model shows
when it is loaded: names and shapes have to be those that config.json tells.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

LAYER_NAME = re.compile(r"^(?P<prefix>.*?)\.(?P<layer>\d+)\.(?P<rest>.+)$")

_CONTAINERS = frozenset({"language_model", "text_model", "llm"})
"""What models call the part that is their text model."""

_OTHER_PART = re.compile(
    r"(^|[._])(vision|visual|image|img|picture|video|vit|siglip|clip|audio|speech|sound|projector"
    r"|connector|resampler|qformer|perceiver)(?=[._]|$)"
)
"""What a name has in it that belongs to another part than the text model."""

_HEAD = "lm_head."


@dataclass(frozen=True)
class TextNames:
    """How the tensors of a text model are called in the files, and in the text model itself.

    Attributes:
        stem: what the names of the text model begin with in the files, such as
            "model.language_model." or "model."; empty: all names are of it.
        removed: the part of the stem that they do not have in the text model.
        added: what they have there instead: "model.", or nothing.
    """

    stem: str = ""
    removed: str = ""
    added: str = ""

    @property
    def renames(self) -> bool:
        """Whether tensors have other names in the files."""
        return bool(self.removed)

    def holds(self, name: str) -> bool:
        """Return whether tensor `name` of the files belongs to the text model."""
        if not self.stem:
            return True
        apart = bool(self.removed) or _OTHER_PART.search(name) is None
        return apart and name.startswith((self.stem, _HEAD))

    def of(self, name: str) -> str:
        """Return what a tensor or weight of the files is called in the text model."""
        if not self.removed or not name.startswith(self.removed):
            return name
        rest = name.removeprefix(self.removed)
        return rest if rest.startswith(_HEAD) else f"{self.added}{rest}"


def text_names(names: Iterable[str], num_layers: int, *, is_part: bool) -> TextNames:
    """Return how the tensors of the text model are called.

    Args:
        names: of all tensors in the files, or of those of the text model.
        num_layers: of the text model.
        is_part: whether the files may hold other parts beside it.
    """
    layers = layers_by_prefix(names)
    wanted = set(range(num_layers))
    whole = [
        prefix
        for prefix, numbers in layers.items()
        if numbers >= wanted and not _OTHER_PART.search(prefix)
    ]
    named = [prefix for prefix in whole if _CONTAINERS.intersection(prefix.split("."))]
    found = min(named or whole, key=lambda prefix: (len(layers[prefix]), prefix), default="")
    parts = found.split(".")
    if not named:
        return TextNames(stem="".join(f"{part}." for part in parts[:-1]) if is_part else "")
    end = max(place for place, part in enumerate(parts) if part in _CONTAINERS) + 1
    container = ".".join([*parts[:end], ""])
    return TextNames(container, container, added="model." if len(parts) == end + 1 else "")


def layers_by_prefix(names: Iterable[str]) -> dict[str, set[int]]:
    """Return the numbers of layers by what stands before the number."""
    layers: dict[str, set[int]] = {}
    for match in filter(None, map(LAYER_NAME.match, names)):
        layers.setdefault(match["prefix"], set()).add(int(match["layer"]))
    return layers
