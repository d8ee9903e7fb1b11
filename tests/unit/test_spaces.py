"""Spaces before punctuation are taken out of a text as transformers does, piece by piece."""

import random
from typing import Any

from transformers import PreTrainedTokenizerBase

from distributed_llm.coordinator.text.spaces import SpacesTakenOut, without_spaces

clean_up: Any = PreTrainedTokenizerBase.clean_up_tokenization


def test_pieces_join_to_what_transformers_makes_of_the_whole_text() -> None:
    chosen = random.Random(0)
    for _ in range(3000):
        pieces = ["".join(chosen.choices("   ''.,?nntmsvreab\n", k=3)) for _ in range(6)]
        pieces += chosen.choices("  '.nntmsvre", k=4)
        chosen.shuffle(pieces)
        text = "".join(pieces)
        assert without_spaces(text) == clean_up(None, text)
        spaces = SpacesTakenOut()
        shown = [spaces.add(piece) for piece in pieces]
        assert "".join(shown) + spaces.finish() == without_spaces(text)


def test_text_comes_as_soon_as_it_is_certain() -> None:
    spaces = SpacesTakenOut()
    pieces = ["Say", " it", " .", " I", " don", "n't", " '", "re", " a", " b", " n", "o", "w"]
    shown = [spaces.add(piece) for piece in pieces]
    assert shown == [
        *("Say", " it", "", ". I", " don", "n't", "", "'re", " a", " b", "", "", " now"),
    ]
    assert spaces.finish() == ""
    assert spaces.add(" n'") == ""
    assert spaces.finish() == " n'"
