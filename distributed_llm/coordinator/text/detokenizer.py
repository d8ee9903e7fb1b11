"""The text of an answer, token by token, and the stop strings in it."""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from distributed_llm.common.errors import InvalidRequest
from distributed_llm.coordinator.events import TextRules
from distributed_llm.coordinator.text.spaces import SpacesTakenOut
from distributed_llm.coordinator.text.tokenizer import NO_TOKENIZER, UNFINISHED, Tokenizer

_USUAL = TextRules()

_MAX_WINDOW_TOKENS = 16
"""Tokens of a `Detokenizer`'s window, above which it is shortened."""

_KEPT_TOKENS = 8
"""Tokens to which it is shortened."""

_EACH_BYTE = "distributed_llm.each_byte"
"""Name of the handler of bytes that are no UTF-8: each becomes a U+FFFD, as in `tokenizers`."""


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return UNFINISHED * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True)
class DetokenizedPiece:
    """The next text of an answer.

    Attributes:
        text: complete characters that cannot be part of a stop string.
        token_count: tokens of the answer so far; after a stop, up to and including the token that
            completed the stop string.
        stop_string: that was found; the text ends before it, and later tokens are ignored. None if
            none was found.
    """

    text: str
    token_count: int
    stop_string: str | None


class Detokenizer:
    """Turns the tokens of one answer into text as they come, at constant cost per token.

    All pieces together are what the answer adds to the text before it: `Tokenizer.decode` of
    context and answer begins with that of the context, and the pieces are the rest, up to the first
    stop string. Only where bytes (<0xE4>) are no valid UTF-8 does the text differ: `decode` gives
    up the whole run of bytes, here its whole characters are kept.

    For each token, a window of the last tokens is decoded, and the text is returned that is new at
    its end; as in text-generation-inference, vLLM (`detokenize_incrementally`) and
    `tokenizers.DecodeStream`. A U+FFFD at the end is held back, for it may be an unfinished
    character. Bytes are decoded on their own, as `decode` needs to see the end of their run. A
    window may start inside a character, because both texts that are compared start with the same
    part of it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        rules: TextRules = _USUAL,
        context: Sequence[int] = (),
    ) -> None:
        """Begin an answer.

        A stop string may be, begin or end with a special token as the tokenizer writes it
        ("<|im_end|>"), although the text of answers may have none.

        Args:
            rules: when it ends, and whether its text has special tokens.
            context: token ids of the text that the answer continues; empty if the answer is a text
                of its own. Only the last few matter.

        Raises:
            InvalidRequest: there are stop strings but no tokenizer.
        """
        if rules.stop_strings and not tokenizer.available:
            raise InvalidRequest(NO_TOKENIZER.format("stop strings"))
        self._tokenizer = tokenizer
        self._stops = _StopStrings(rules.stop_strings) if rules.stop_strings else None
        self._spaces = SpacesTakenOut() if tokenizer.takes_spaces_out else None
        self._hidden = None if rules.hidden is None else frozenset(rules.hidden)
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that are final
        self._bytes = _Utf8Decoder(_EACH_BYTE)
        self._in_run = False  # whether the last token was a byte
        self._count = 0
        self._stop_string: str | None = None
        spoken = (token for token in reversed(context) if not self._is_silent(token))
        for token_id in reversed(list(islice(spoken, _KEPT_TOKENS))):
            self._advance(token_id)

    def feed(self, token_ids: Iterable[int]) -> DetokenizedPiece:
        """Return the text that the next tokens of the answer add."""
        pieces = []
        for token_id in token_ids:
            if self._stop_string is not None:
                break
            self._count += 1
            if not self._is_silent(token_id):
                pieces.append(self._release(self._tidied(self._advance(token_id))))
            elif self._stops:
                pieces.append(self._release_mark(token_id))
        return DetokenizedPiece("".join(pieces), self._count, self._stop_string)

    def finish(self) -> DetokenizedPiece:
        """Return the text that was held back, as the answer has no further tokens."""
        text = ""
        if self._stop_string is None:
            rest = self._end_run() if self._in_run else self._pending()
            text = self._release(self._tidied(rest, last=True))
        if self._stops and self._stop_string is None:
            text += self._stops.held()
        self._window, self._given = [], 0
        return DetokenizedPiece(text, self._count, self._stop_string)

    def _is_silent(self, token_id: int) -> bool:
        if self._hidden is None:
            return self._tokenizer.is_silent(token_id)
        hidden = token_id in self._hidden and self._tokenizer.is_silent(token_id)
        return hidden or not self._tokenizer.knows(token_id)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._hidden is None)

    def _advance(self, token_id: int) -> str:
        """Return the text that this token makes final."""
        byte = self._tokenizer.byte_of(token_id)
        if byte is not None:
            return self._advance_byte(token_id, byte)
        rest = self._end_run() if self._in_run else ""
        self._window.append(token_id)
        text = self._decode(self._window)
        end = max(self._given, len(text) - self._unsettled(text))
        final, self._given = text[self._given : end], end
        if len(self._window) > _MAX_WINDOW_TOKENS:
            self._shorten(waiting=len(text) - end)
        return rest + final

    def _advance_byte(self, token_id: int, byte: int) -> str:
        before = ""
        if not self._in_run:
            before, self._in_run = self._pending(), True
        text = self._bytes.decode(bytes([byte]))
        if not self._window and text == " ":  # most tokenizers begin no text with a space
            text = self._decode([token_id])
        self._window = [*self._window[1 - _KEPT_TOKENS :], token_id]
        return before + text

    def _end_run(self) -> str:
        """Return what is left of a run of bytes, which has no further ones."""
        self._in_run = False
        self._given = len(self._decode(self._window))
        return self._bytes.decode(b"", final=True)

    def _pending(self) -> str:
        """Return the text of the window that was held back."""
        return self._decode(self._window)[self._given :]

    def _unsettled(self, text: str) -> int:
        """Return how many characters at the end of a text the next token may change."""
        ends = (end for end in self._tokenizer.ends_unsettled if text.endswith(end))
        return len(next(ends, ""))

    def _shorten(self, waiting: int) -> None:
        """Drop the oldest tokens; the last `waiting` characters have not been returned yet."""
        recent = self._window[-_KEPT_TOKENS:]
        length = len(self._decode(recent))
        if length > waiting:
            self._window, self._given = recent, length - waiting

    def _release_mark(self, token_id: int) -> str:
        """Return the text that a special token makes certain, which is not shown itself."""
        text = self._release(self._spaces.finish()) if self._spaces else ""
        if self._stop_string is None:
            text += self._release(self._tokenizer.special_name(token_id), visible=False)
        return text

    def _tidied(self, text: str, *, last: bool = False) -> str:
        """Return the text that is certain, if spaces are to be taken out of it."""
        if self._spaces is None:
            return text
        tidied = self._spaces.add(text)
        return tidied + self._spaces.finish() if last else tidied

    def _release(self, text: str, *, visible: bool = True) -> str:
        if self._stops is None:
            return text
        released, self._stop_string = self._stops.add(text, visible=visible)
        return released


class _StopStrings:
    """Finds stop strings in a text that comes in pieces, and holds back what may begin one.

    They are looked for in the text that is shown, and in the same text with the special tokens
    that are not shown.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._released = 0  # characters of the text
        self._held = ""  # those after them
        self._marked = ""  # the end of the text with special tokens
        self._positions: list[int] = []  # in the text, of each character of `_marked`

    def add(self, piece: str, *, visible: bool) -> tuple[str, str | None]:
        """Return the text that can be shown now, and the stop string before which it ends.

        Args:
            visible: whether the piece is text; otherwise it is a special token.
        """
        end = self._released + len(self._held)
        self._marked += piece
        if visible:
            self._held += piece
            self._positions += range(end, end + len(piece))
            end += len(piece)
        else:
            self._positions += [end] * len(piece)
        starts = {stop: self._find(stop) for stop in self._stops}
        found = {start: stop for stop, start in reversed(starts.items()) if start is not None}
        if found:
            first = min(found)
            return self._release(first), found[first]
        waits = max(_overlap(self._held, stop) for stop in self._stops)
        marked = max(_overlap(self._marked, stop) for stop in self._stops)
        cut = len(self._marked) - marked
        self._marked, self._positions = self._marked[cut:], self._positions[cut:]
        return self._release(min([end - waits, *self._positions[:1]])), None

    def held(self) -> str:
        """Return the text that is held back, as nothing follows it."""
        return self._held

    def _find(self, stop: str) -> int | None:
        """Return where in the text a stop string begins, or None."""
        plain, marked = self._held.find(stop), self._marked.find(stop)
        starts = [self._released + plain] if plain >= 0 else []
        starts += [self._positions[marked]] if marked >= 0 else []
        return min(starts, default=None)

    def _release(self, end: int) -> str:
        """Return the text up to a position."""
        count = end - self._released
        text, self._held = self._held[:count], self._held[count:]
        self._released = end
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest proper prefix of `stop` that `text` ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
