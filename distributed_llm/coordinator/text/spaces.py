"""Spaces before punctuation, which some tokenizers ask to be taken out of a text."""

import re

_TAKEN_OUT = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")),
)
"""Each is replaced everywhere before the next one is looked for, as in transformers."""

_SETTLED = re.compile(r"(?<=[^ ]{3})|(?<= [^ .?!,'n][^ ])|(?<= [^ .?!,'nmsvr])")
"""Where no space before it is taken out because of what follows, or the other way round."""


def without_spaces(text: str) -> str:
    """Return a text without the spaces before its punctuation, as in transformers."""
    for old, new in _TAKEN_OUT:
        text = text.replace(old, new)
    return text


class SpacesTakenOut:
    """Takes spaces before punctuation out of a text that comes in pieces."""

    def __init__(self) -> None:
        self._held = ""  # what may depend on what follows

    def add(self, piece: str) -> str:
        """Return the text that can be shown now."""
        text = self._held + piece
        end = text.find(" ")
        if end < 0:
            end = len(text)
        for settled in _SETTLED.finditer(text, end):
            end = settled.end()
        self._held = text[end:]
        return without_spaces(text[:end])

    def finish(self) -> str:
        """Return the text that was held back, as nothing follows it."""
        text, self._held = without_spaces(self._held), ""
        return text
