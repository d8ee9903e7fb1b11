"""Text to token ids and back: prompts, chat templates, and the text of tokens.

Nothing in a checkpoint is executed except its chat template, in the sandbox of transformers. A
`Tokenizer` may be used from any thread.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.messages import MAX_SPELLING, Chat, Spelling
from distributed_llm.coordinator.model import TokenizerFacts
from distributed_llm.coordinator.text.chat_template import (
    plain_template,
    render_chat,
    tool_template,
)
from distributed_llm.coordinator.text.languages import Languages
from distributed_llm.coordinator.text.python_backend import WORD_GOES_ON, PythonBackend
from distributed_llm.coordinator.text.source_tokenizers import source_config
from distributed_llm.coordinator.text.spaces import without_spaces
from distributed_llm.coordinator.text.tokenizer_files import (
    has_tokenizer,
    read_tokenizer,
    why_no_template,
)

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""The decoded text of an unfinished character."""

NO_TOKENIZER = "The checkpoint has no tokenizer; send the prompt as token ids, without {}."
"""What is said to a request for what only a tokenizer can do."""


class Tokenizer:
    """The tokenizer of a checkpoint; without one, only prompts of token ids can be served.

    Attributes:
        has_source: whether prompts are sources of an encoder-decoder, and answers texts of their
            own.
        takes_spaces_out: whether spaces before punctuation are no part of a text, although
            `decode` leaves them in.
        ends_unsettled: what a decoded text may end with that the next token changes.
        languages: that sources may be in, and answers.
        has_own_spaces: whether each token says by itself where spaces are, as a grammar needs it.
    """

    def __init__(
        self, hugging_face: Any | None, why_no_chat: str = "", *, has_source: bool = False
    ) -> None:
        """Wrap a tokenizer of transformers. Use `load` or `open` instead.

        Args:
            why_no_chat: why it has no chat template, and what to do about that.
            has_source: whether it is that of an encoder-decoder.
        """
        self._hugging_face = hugging_face
        self._why_no_chat = why_no_chat
        self._backend: Any = None
        self.languages = Languages(hugging_face)
        self.has_source = has_source
        self.takes_spaces_out = has_source and _takes_spaces_out(hugging_face)
        self.ends_unsettled: tuple[str, ...] = (UNFINISHED,)
        self.has_own_spaces = True
        self._special: dict[int, str] = {}
        self._bytes: dict[int, int] = {}
        self._spellings: dict[int, Spelling | None] = {}  # of tokens that were asked for
        self._letters: dict[str, int] = {}
        if hugging_face is not None:
            if self.takes_spaces_out:
                hugging_face.clean_up_tokenization_spaces = False  # `decode` may be of a piece
            self._backend = _backend_of(hugging_face)
            if isinstance(self._backend, PythonBackend) and self._backend.joins_words:
                self.ends_unsettled, self.has_own_spaces = (UNFINISHED, WORD_GOES_ON), False
            added = self._backend.get_added_tokens_decoder().items()
            self._special = {i: token.content for i, token in added if token.special}
            self._bytes = _byte_tokens(self._backend)
            self._letters = _byte_letters(self._backend)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Return the tokenizer in `folder`.

        Raises:
            CheckpointError: there is no tokenizer, it is broken, it needs to run its own code, or
                a package that is not installed.
        """
        has_source = source_config(folder) is not None
        return cls(read_tokenizer(folder), why_no_template(folder), has_source=has_source)

    @classmethod
    def open(cls, folder: Path) -> "Tokenizer":
        """Return the tokenizer in `folder`, or one for token ids only if the folder has none.

        Raises:
            CheckpointError: the tokenizer is broken, it needs to run its own code, or a package
                that is not installed.
        """
        if has_tokenizer(folder):
            return cls.load(folder)
        return cls(None, has_source=source_config(folder) is not None)

    @property
    def available(self) -> bool:
        """Whether the checkpoint has a tokenizer; without one there are only token ids."""
        return self._backend is not None

    @property
    def end_token(self) -> int | None:
        """Token id with which texts end, by the tokenizer's own files; None if they name none."""
        return None if self._hugging_face is None else self._hugging_face.eos_token_id

    def facts(self) -> TokenizerFacts:
        """Return what its files say of it."""
        if self._hugging_face is None:
            return TokenizerFacts()
        named = self._hugging_face.special_tokens_map.items()
        return TokenizerFacts(
            available=True,
            end_token=self.end_token,
            special_tokens={name: token for name, token in named if isinstance(token, str)},
            chat_template=plain_template(self._hugging_face),
            tool_template=tool_template(self._hugging_face),
        )

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of `text`.

        Args:
            special: with the special tokens that start or end a prompt.

        Raises:
            InvalidRequest: there is no tokenizer, or `text` is not valid Unicode.
        """
        return self._encode(text, add_special_tokens=special)

    def encode_chat(self, chat: Chat) -> list[int]:
        """Return the token ids of a conversation, ready for the assistant's answer.

        Raises:
            InvalidRequest: there is no tokenizer or chat template, the template refuses the
                conversation or does not know its tools or arguments, or what it wrote is far longer
                than what it was given.
        """
        if self._hugging_face is None:
            raise InvalidRequest(NO_TOKENIZER.format("a chat"))
        if self._why_no_chat and not self._hugging_face.chat_template:
            raise InvalidRequest(self._why_no_chat)
        text = render_chat(self._hugging_face, chat)
        return self._encode(text, add_special_tokens=False)

    def text_of(self, token_ids: Sequence[int], *, special: bool) -> str:
        """Return the text of `token_ids`, with or without special tokens.

        Those that the tokenizer does not know have no text.

        Raises:
            InvalidRequest: there is no tokenizer, or one is below zero.
        """
        if self._backend is None:
            raise InvalidRequest(
                "The checkpoint has no tokenizer, so token ids have no text. Use a model with one."
            )
        if any(token_id < 0 for token_id in token_ids):
            raise InvalidRequest("Token ids must be at least 0.")
        text = str(self._backend.decode(list(token_ids), skip_special_tokens=not special))
        return without_spaces(text) if self.takes_spaces_out else text

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; empty without a tokenizer."""
        if self._backend is None:
            return ""
        ids = list(token_ids)
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def is_silent(self, token_id: int) -> bool:
        """Return whether a token has no text: it is special, or unknown to the tokenizer."""
        return token_id in self._special or not self.knows(token_id)

    def knows(self, token_id: int) -> bool:
        """Return whether the vocabulary has a token."""
        return self._backend is not None and self._backend.id_to_token(token_id) is not None

    def id_of(self, written: str) -> int:
        """Return the id of a token, by how it is written ("deu_Latn").

        Raises:
            InvalidRequest: there is no such token, or no tokenizer.
        """
        if self._backend is None:
            raise InvalidRequest(NO_TOKENIZER.format("forced_bos_token_id as a text"))
        token_id = self._backend.token_to_id(written)
        if token_id is None:
            raise InvalidRequest(
                f"The model's tokenizer has no token {written!r}, which forced_bos_token_id "
                "names. Give one that it has, or an id."
            )
        return int(token_id)

    def special_name(self, token_id: int) -> str:
        """Return how a special token is written ("</s>"); empty for any other token."""
        return self._special.get(token_id, "")

    def byte_of(self, token_id: int) -> int | None:
        """Return the byte that a token stands for, of a character that the vocabulary lacks.

        None for tokens that are whole pieces of text, and for all tokens of tokenizers whose
        pieces are bytes anyway (GPT-2's kind).
        """
        return self._bytes.get(token_id)

    def spell(self, token_ids: Sequence[int]) -> tuple[Spelling | None, ...]:
        """Return how tokens are written in the middle of a text; nothing without a tokenizer.

        None for tokens that the tokenizer does not know.
        """
        if self._backend is None:
            return ()
        for token_id in token_ids:
            if token_id not in self._spellings:
                self._spellings[token_id] = self._spelling(token_id)
        return tuple(self._spellings[token_id] for token_id in token_ids)

    def vocabulary(self) -> list[tuple[bytes, bool]]:
        """Return how each token is written in the middle of a text, by id, and whether it is text.

        Special tokens are none, nor are ids that no token has. Takes a second for 100,000 tokens.
        """
        assert self._backend is not None
        pieces = {token_id: piece for piece, token_id in self._backend.get_vocab().items()}
        in_python = isinstance(self._backend, PythonBackend)
        written = [(b"<no token>", False)] * (max(pieces) + 1)
        for token_id, name in self._special.items():
            written[token_id] = name.encode(), False
        unread = []
        for token_id in pieces.keys() - self._special.keys():
            if in_python or self.byte_of(token_id) is not None or self._letters:
                written[token_id] = self._bytes_of(token_id, pieces[token_id]), True
            else:
                unread.append(token_id)
        if not unread:
            return written
        before = self._encode("a", add_special_tokens=False)
        texts = self._backend.decode_batch([[*before, token_id] for token_id in unread])
        start = len(self.decode(before))
        for token_id, text in zip(unread, texts, strict=True):
            written[token_id] = text[start:].encode(), True
        return written

    def encode_inside(self, text: str) -> list[int]:
        """Return token ids that add exactly `text` to a text; empty if none are found."""
        for before in ("", "\n", "a"):
            start = self._encode(before, add_special_tokens=False) if before else []
            ids = self._encode(before + text, add_special_tokens=False)
            if ids[: len(start)] != start:
                continue
            inside = ids[len(start) :]
            spelled = self.spell(inside)
            if b"".join(one.written for one in spelled if one) == text.encode():
                return inside
        return []

    def _spelling(self, token_id: int) -> Spelling | None:
        assert self._backend is not None
        if name := self.special_name(token_id):
            return Spelling(written=name.encode()[:MAX_SPELLING], is_text=False)
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return None
        text = self._bytes_of(token_id, piece)
        return Spelling(written=text[:MAX_SPELLING], is_text=len(text) <= MAX_SPELLING)

    def _bytes_of(self, token_id: int, piece: str) -> bytes:
        byte = self.byte_of(token_id)
        if byte is not None:
            return bytes([byte])
        if isinstance(self._backend, PythonBackend):
            return self._backend.written(piece)
        if self._letters:
            known = [self._letters.get(letter) for letter in piece]
            return piece.encode() if None in known else bytes(b for b in known if b is not None)
        before = self._encode("a", add_special_tokens=False)  # a text may not begin with a space
        return self.decode([*before, token_id])[len(self.decode(before)) :].encode()

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._backend is None:
            raise InvalidRequest(NO_TOKENIZER.format("text"))
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise InvalidRequest(f"The prompt is not valid Unicode: {exc.reason}.") from exc
        # Unlike `encode`, this lets other threads run; and it leaves out offsets.
        batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(batch[0].ids)


def _backend_of(hugging_face: Any) -> Any:
    """Return what encodes and decodes, without a limit to the length of texts."""
    backend = getattr(hugging_face, "backend_tokenizer", None)
    if backend is None:
        return PythonBackend(hugging_face)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _takes_spaces_out(hugging_face: Any | None) -> bool:
    """Return whether transformers takes spaces before punctuation out of texts."""
    if hugging_face is None or not hugging_face.clean_up_tokenization_spaces:
        return False
    backend = getattr(hugging_face, "backend_tokenizer", None)
    return backend is None or type(backend.model).__name__ != "BPE"


def _byte_letters(backend: Any) -> dict[str, int]:
    """Return the bytes that letters of pieces stand for, of GPT-2's kind; else nothing."""
    if backend.decoder is None or backend.decoder.decode(["a", "\u0120"]) != "a ":
        return {}
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + number): byte for number, byte in enumerate(hidden)
    }


def _byte_tokens(backend: Any) -> dict[int, int]:
    """Return the bytes that tokens like <0x0A> stand for, by id; none if they are mere text."""
    ids = [backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    letter = ids[ord("A")]
    if letter is None or backend.decode([letter], skip_special_tokens=False) != "A":
        return {}
    return {token_id: byte for byte, token_id in enumerate(ids) if token_id is not None}
