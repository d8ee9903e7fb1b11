"""Tokenizers that transformers has in Python, used like those of the 'tokenizers' package."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

WORD_GOES_ON = "@@"
"""What a piece of BlenderbotSmall ends with if its word has further pieces."""

_SPACE = "▁"
"""The space in pieces of sentencepiece."""


@dataclass(frozen=True)
class Encoding:
    """The token ids of a text."""

    ids: list[int]


class PythonBackend:
    """A tokenizer of transformers' own, with the methods of `tokenizers.Tokenizer` that are used.

    Args:
        tokenizer: of transformers.
    """

    decoder = None
    """There is none that could be asked by itself."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

        self._kind = type(tokenizer).__name__

    @property
    def joins_words(self) -> bool:
        """Whether the piece before it says if there is a space before a piece."""
        return self._kind == "BlenderbotSmallTokenizer"

    def written(self, piece: str) -> bytes:
        """Return how a piece is written in the middle of a text."""
        if self.joins_words:
            return piece.removesuffix(WORD_GOES_ON).encode()
        if self._kind == "ByT5Tokenizer" and len(piece) == 1:
            return bytes([ord(piece)])
        return piece.replace(_SPACE, " ").encode()

    def encode_batch_fast(
        self, texts: Sequence[str], *, add_special_tokens: bool
    ) -> list[Encoding]:
        """Return the token ids of texts, of any length."""
        encoded = self._tokenizer(
            list(texts), add_special_tokens=add_special_tokens, truncation=False, verbose=False
        )
        return [Encoding(list(ids)) for ids in encoded["input_ids"]]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; those that no token has have no text."""
        known = [token_id for token_id in ids if token_id in self._pieces]
        return str(self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens))

    def id_to_token(self, token_id: int) -> str | None:
        """Return the piece with an id, or None."""
        return self._pieces.get(token_id)

    def token_to_id(self, piece: str) -> int | None:
        """Return the id of a piece, or None."""
        return self._ids.get(piece)

    def get_vocab(self) -> dict[str, int]:
        """Return all ids, by their pieces."""
        return dict(self._ids)

    def get_added_tokens_decoder(self) -> Mapping[int, Any]:
        """Return the tokens that are no pieces of text, by id."""
        return dict(self._tokenizer.added_tokens_decoder)

    @cached_property
    def _ids(self) -> dict[str, int]:
        """Return the ids of pieces of answers; only Marian may have others for prompts."""
        if getattr(self._tokenizer, "separate_vocabs", False):
            return dict(self._tokenizer.target_encoder)
        languages = getattr(self._tokenizer, "lang_token_to_id", {})  # M2M100's
        return {**languages, **self._tokenizer.get_vocab()}

    @cached_property
    def _pieces(self) -> dict[int, str]:
        return {token_id: piece for piece, token_id in self._ids.items()}
