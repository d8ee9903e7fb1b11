"""Text to token ids and back: prompts, chat templates, and answers token by token.

`tokenizer.json` is read by transformers' generic fast tokenizer, which needs no torch: 60 MB and a
second less than `AutoTokenizer`, which converts folders with only older files (vocab.json,
merges.txt). Nothing in a checkpoint is executed except its chat template, in the sandbox of
transformers. A `Tokenizer` may be used from any thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed_llm.common.errors import CheckpointError, InvalidRequest
from distributed_llm.common.messages import ChatMessage
from distributed_llm.common.model_files import read_json

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)

_FIXED_CHAT_CHARS = 65536
"""Characters that a chat template may add to any conversation."""

_CHARS_PER_TURN = 1024
"""Characters that it may add for each message besides."""

_ERROR_CHARS = 500
"""Characters of another package's error message that are passed on."""

_MAX_WINDOW_TOKENS = 16
"""Tokens of a `Detokenizer`'s window, above which it is shortened."""

_KEPT_TOKENS = 8
"""Tokens to which it is shortened."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""The decoded text of an unfinished character."""

_NO_TOKENIZER = "The checkpoint has no tokenizer; send the prompt as token ids, without {}."


class Tokenizer:
    """The tokenizer of a checkpoint; without one, only prompts of token ids can be served."""

    def __init__(self, hugging_face: Any | None) -> None:
        """Wrap a fast tokenizer of transformers. Use `load` or `open` instead."""
        self._hugging_face = hugging_face
        self._backend = None if hugging_face is None else hugging_face.backend_tokenizer
        self._special_ids: frozenset[int] = frozenset()
        self._byte_ids: frozenset[int] = frozenset()
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            added = self._backend.get_added_tokens_decoder().items()
            self._special_ids = frozenset(i for i, token in added if token.special)
            self._byte_ids = _byte_fallback_ids(self._backend)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Return the tokenizer in `folder`.

        Raises:
            CheckpointError: there is no tokenizer, it is broken, or it needs to run its own code.
        """
        if not _has_tokenizer(folder):
            raise CheckpointError(
                f"There is no tokenizer in {folder}. Copy tokenizer.json and tokenizer_config.json "
                "of the model there."
            )
        _refuse_code(folder)
        try:
            loaded = _load(folder)
        except Exception as exc:  # transformers and tokenizers raise whatever a bad file causes
            raise CheckpointError(
                f"The tokenizer in {folder} cannot be read ({_short(exc)}). Download it again. "
                "Where there is no tokenizer.json, AutoTokenizer.from_pretrained(folder)"
                ".save_pretrained(folder) writes one where sentencepiece is installed."
            ) from exc
        if getattr(loaded, "backend_tokenizer", None) is None:
            raise CheckpointError(
                f"The tokenizer in {folder} ({type(loaded).__name__}) is not one of the "
                "'tokenizers' package. Use a version of the model that has a tokenizer.json."
            )
        return cls(loaded)

    @classmethod
    def open(cls, folder: Path) -> "Tokenizer":
        """Return the tokenizer in `folder`, or one for token ids only if the folder has none.

        Raises:
            CheckpointError: the tokenizer is broken, or it needs to run its own code.
        """
        return cls.load(folder) if _has_tokenizer(folder) else cls(None)

    @property
    def available(self) -> bool:
        """Whether the checkpoint has a tokenizer; without one there are only token ids."""
        return self._backend is not None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, with the special tokens that start or end a prompt.

        Raises:
            InvalidRequest: there is no tokenizer, or `text` is not valid Unicode.
        """
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the token ids of a conversation, ready for the assistant's answer.

        Raises:
            InvalidRequest: there is no tokenizer or chat template, the template refuses the
                messages, or what it wrote is far longer than they are.
        """
        if self._hugging_face is None:
            raise InvalidRequest(_NO_TOKENIZER.format("a chat"))
        if not messages:
            raise InvalidRequest("The conversation is empty. Send at least one message.")
        if not self._hugging_face.chat_template:
            raise InvalidRequest(
                "The model has no chat template; it was not made for conversations. Send the "
                "prompt as text."
            )
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        try:
            text = self._hugging_face.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False
            )
        except Exception as exc:  # a template is a program; it may fail in any way
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {_short(exc)}."
            ) from exc
        limit = _FIXED_CHAT_CHARS + _CHARS_PER_TURN * len(turns)
        if len(text) > limit + 2 * sum(len(turn.content) for turn in messages):
            raise InvalidRequest(
                f"The model's chat template made {len(text)} characters of a much shorter "
                "conversation; it is broken. Send the prompt as text."
            )
        return self._encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids` without special tokens; empty without a tokenizer."""
        if self._backend is None:
            return ""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=True))

    def is_silent(self, token_id: int) -> bool:
        """Return whether a token has no text: it is special, or unknown to the tokenizer."""
        if self._backend is None or token_id in self._special_ids:
            return True
        return self._backend.id_to_token(token_id) is None

    def is_byte(self, token_id: int) -> bool:
        """Return whether a token is one byte of a character that the vocabulary lacks."""
        return token_id in self._byte_ids

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._backend is None:
            raise InvalidRequest(_NO_TOKENIZER.format("text"))
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise InvalidRequest(f"The prompt is not valid Unicode: {exc.reason}.") from exc
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)


@dataclass(frozen=True)
class DetokenizedPiece:
    """The next text of an answer.

    Attributes:
        text: complete characters that cannot be part of a stop string.
        token_count: tokens of the answer so far; after a stop, up to and including the token that
            completed the stop string.
        stopped: whether a stop string was found; the text ends before it, and later tokens are
            ignored.
    """

    text: str
    token_count: int
    stopped: bool


class Detokenizer:
    """Turns the tokens of one answer into text as they come, at constant cost per token.

    All pieces together are `Tokenizer.decode` of all tokens, up to the first stop string.

    For each token, a window of the last tokens is decoded, and the text is returned that is new at
    its end; as in text-generation-inference, vLLM (`detokenize_incrementally`) and
    `tokenizers.DecodeStream`. Text that may still change is held back: a U+FFFD at the end, which
    may be an unfinished character, and a run of byte tokens (<0x0A>), all of which become U+FFFD if
    the run is not valid UTF-8. A window may start inside a character, because both texts that are
    compared start with the same part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        """Begin an answer that ends before the first occurrence of one of `stop_strings`.

        Raises:
            InvalidRequest: there are stop strings but no tokenizer.
        """
        if stop_strings and not tokenizer.available:
            raise InvalidRequest(_NO_TOKENIZER.format("stop strings"))
        self._tokenizer = tokenizer
        self._stops = tuple(stop for stop in stop_strings if stop)
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that are final
        self._held = ""  # final text that may be the beginning of a stop string
        self._count = 0
        self._stopped = False

    def feed(self, token_ids: Sequence[int]) -> DetokenizedPiece:
        """Return the text that the next tokens of the answer add."""
        pieces = []
        for token_id in token_ids:
            if self._stopped:
                break
            self._count += 1
            if not self._tokenizer.is_silent(token_id):
                pieces.append(self._release(*self._advance(token_id)))
        return DetokenizedPiece("".join(pieces), self._count, self._stopped)

    def finish(self) -> DetokenizedPiece:
        """Return the text that was held back, as the answer has no further tokens."""
        rest = "" if self._stopped else self._tokenizer.decode(self._window)[self._given :]
        text, self._held, self._window, self._given = self._held + rest, "", [], 0
        return DetokenizedPiece(text, self._count, self._stopped)

    def _advance(self, token_id: int) -> tuple[str, str]:
        """Return (final text, text that may still change) that this token adds."""
        self._window.append(token_id)
        in_run = self._tokenizer.is_byte(token_id)
        if in_run and not self._stops:
            return "", ""  # only stop strings would be looked for before the run ends
        text = self._tokenizer.decode(self._window)
        if in_run:
            return "", text[self._given :]
        end = max(self._given, len(text) - text.endswith(_UNFINISHED))
        final, self._given = text[self._given : end], end
        if len(self._window) > _MAX_WINDOW_TOKENS:
            self._shorten(waiting=len(text) - end)
        return final, text[end:]

    def _shorten(self, waiting: int) -> None:
        """Drop the oldest tokens; the last `waiting` characters have not been returned yet."""
        recent = self._window[-_KEPT_TOKENS:]
        length = len(self._tokenizer.decode(recent))
        if length > waiting:
            self._window, self._given = recent, length - waiting

    def _release(self, final: str, changing: str) -> str:
        """Return the held text and `final` up to a stop string, or to what may begin one."""
        self._held += final
        if not self._stops:
            text, self._held = self._held, ""
            return text
        text = self._held + changing
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self._stopped, self._held = True, ""
            return text[: min(starts)]
        end = len(self._held) - max(_overlap(self._held, stop) for stop in self._stops)
        shown, self._held = self._held[:end], self._held[end:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest proper prefix of `stop` that `text` ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def _refuse_code(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    auto_map = read_json(path).get("auto_map") if path.exists() else None
    if (folder / "tokenizer.json").exists():
        return  # read by a class of transformers, whatever code is named
    if auto_map and (not isinstance(auto_map, dict) or "AutoTokenizer" in auto_map):
        raise CheckpointError(
            f"{path} asks to run code of its own (auto_map). Code from checkpoints is never run; "
            "use a version of the model whose tokenizer is part of transformers."
        )


def _load(folder: Path) -> Any:
    if (folder / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    from transformers import AutoTokenizer  # loads torch

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _byte_fallback_ids(backend: Any) -> frozenset[int]:
    ids = [backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    letter = ids[ord("A")]
    if letter is None or backend.decode([letter], skip_special_tokens=False) != "A":
        return frozenset()
    return frozenset(token_id for token_id in ids if token_id is not None)


def _short(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"[:_ERROR_CHARS]
