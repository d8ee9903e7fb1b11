"""What the text process does: prompts become token ids, and the tokens of answers text."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from distributed_llm.common import codec
from distributed_llm.common.errors import (
    ContextLengthExceeded,
    DistributedLLMError,
    InvalidRequest,
    RemoteProtocolError,
    RequestCancelled,
    TextError,
)
from distributed_llm.common.tensors import token_ids_of_frame
from distributed_llm.common.types import TokenId
from distributed_llm.common.wording import too_long_text
from distributed_llm.coordinator.events import TextRules
from distributed_llm.coordinator.text.detokenizer import Detokenizer
from distributed_llm.coordinator.text.grammars import AnswerGrammar, Grammars
from distributed_llm.coordinator.text.messages import (
    Answered,
    AnswerText,
    AnswerTokens,
    Drop,
    Encoded,
    Failed,
    Prompt,
    Question,
    Resume,
    Texts,
    Tokens,
)
from distributed_llm.coordinator.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_CONTEXT_TOKENS: Final = 64
"""Tokens at the end of a prompt that are kept as context: some may be special, and have no text."""


@dataclass
class _Answer:
    """An answer whose text is being made; `grammar` is None if it may be any text."""

    text: Detokenizer
    grammar: AnswerGrammar | None


class TextWork:
    """The prompts that wait to be encoded, and the answers whose text is being made. Thread-safe.

    Prompts are encoded in threads of their own, so that a long one delays no text; those of
    requests that have ended are not encoded at all. Of those with a grammar, which may take
    seconds, one is in hand at a time, so that they leave a thread to the others.

    Args:
        context_length: tokens that the model can take; longer prompts are refused.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._changed = threading.Condition()
        self._waiting: dict[int, Prompt | Question] = {}
        self._begun: set[int] = set()
        self._compiling = False
        self._answers: dict[int, list[_Answer]] = {}
        self._grammars = Grammars(tokenizer)

    def put(self, prompt: Prompt | Question) -> None:
        """Queue a prompt, or a question about one."""
        with self._changed:
            self._waiting[prompt.request] = prompt
            self._changed.notify()

    def take(self) -> Prompt | Question:
        """Return the one that has waited longest; wait until there is one."""
        with self._changed:
            while (request := self._next()) is None:
                self._changed.wait()
            self._begun.add(request)
            order = self._waiting.pop(request)
            self._compiling = self._compiling or _has_grammar(order)
            return order

    def _next(self) -> int | None:
        """Return the request that has waited longest and may be begun."""
        return next(
            (
                request
                for request, order in self._waiting.items()
                if not (self._compiling and _has_grammar(order))
            ),
            None,
        )

    def drop(self, order: Drop) -> None:
        """Forget a request."""
        with self._changed:
            self._waiting.pop(order.request, None)
            self._begun.discard(order.request)
            self._answers.pop(order.request, None)

    def do(self, order: Prompt | Question) -> Encoded | Answered | Failed:
        """Do what was taken; return the token ids of a prompt, an answer, or why there is none."""
        return self._answer(order) if isinstance(order, Question) else self._encode(order)

    def _encode(self, prompt: Prompt) -> Encoded | Failed:
        result: Encoded | Failed
        answers: list[_Answer] = []
        try:
            token_ids = self._token_ids(prompt)
            # A turn of a conversation is a text of its own, and so is what a decoder writes.
            continued = prompt.kind != "chat" and not self._tokenizer.has_source
            context = tuple(token_ids[-_CONTEXT_TOKENS:]) if continued else ()
            answers = self._begin(prompt.rules, context, prompt.num_choices)
            ids = np.asarray(token_ids, dtype=np.int32).tobytes()
            mask = _first_mask(answers[0]) if answers else b""  # an embedding has no answers
            result = Encoded(
                request=prompt.request,
                token_ids=ids,
                context=context,
                mask=mask,
                first=self._first(prompt.rules),
            )
        except DistributedLLMError as exc:
            result = Failed(request=prompt.request, code=exc.code, message=str(exc))
            answers = []
        except Exception as exc:
            logger.exception("tokenizing failed")
            result = _bug(prompt.request, f"The prompt cannot be turned into tokens: {exc!r:.500}")
        with self._changed:
            if _has_grammar(prompt):
                self._compiling = False
                self._changed.notify()
            if prompt.request not in self._begun:
                code = RequestCancelled.code
                return Failed(request=prompt.request, code=code, message="The request has ended.")
            self._begun.discard(prompt.request)
            if answers:
                self._answers[prompt.request] = answers
        return result

    def _answer(self, question: Question) -> Answered | Failed:
        with self._changed:
            self._begun.discard(question.request)
        try:
            if question.kind == "token_ids":
                token_ids = token_ids_of_frame(question.payload)
                payload = self._tokenizer.text_of(token_ids, special=question.special).encode()
            else:
                token_ids = self._ids_of(question.kind, question.payload, special=question.special)
                payload = np.asarray(token_ids, dtype=np.int32).tobytes()
        except DistributedLLMError as exc:
            return Failed(request=question.request, code=exc.code, message=str(exc))
        except Exception as exc:
            logger.exception("answering a question about text failed")
            return _bug(
                question.request, f"That cannot be turned into tokens or text: {exc!r:.500}"
            )
        return Answered(request=question.request, payload=payload)

    def resume(self, order: Resume) -> Failed | None:
        """Go on with a request; return why that is impossible, or None."""
        try:
            count = len(order.answers)
            answers = self._begin(order.rules, order.context, count, tried=True)
            for answer, token_ids in zip(answers, order.answers, strict=True):
                answer.text.feed(token_ids)
                if answer.grammar:
                    answer.grammar.feed(token_ids)
        except Exception as exc:
            logger.exception("detokenizing failed")
            return _bug(order.request, f"The text of the answer cannot be made: {exc!r:.500}")
        with self._changed:
            self._answers[order.request] = answers
        return None

    def texts(self, order: Tokens) -> Texts:
        """Return the texts of a step; requests that have ended have none."""
        pieces, failures = [], []
        for tokens in order.answers:
            if answers := self._answers.get(tokens.request):
                try:
                    pieces.append(self._piece(answers[tokens.choice], tokens))
                except DistributedLLMError as exc:
                    failed = Failed(request=tokens.request, code=exc.code, message=str(exc))
                    failures.append(failed)
                except Exception as exc:
                    logger.exception("detokenizing failed")
                    why = f"The text of the answer cannot be made: {exc!r:.500}"
                    failures.append(_bug(tokens.request, why))
        return Texts(pieces=tuple(pieces), failures=tuple(failures))

    def _begin(
        self, rules: TextRules, context: Sequence[int], count: int, *, tried: bool = False
    ) -> list[_Answer]:
        texts = [Detokenizer(self._tokenizer, rules, context) for _ in range(count)]
        if rules.grammar is None:
            return [_Answer(text, None) for text in texts]
        grammars = self._grammars.begin(rules.grammar, rules.ends, count, tried=tried)
        return list(map(_Answer, texts, grammars))

    def _piece(self, answer: _Answer, tokens: AnswerTokens) -> AnswerText:
        piece = answer.text.feed(tokens.token_ids)
        text, mask, complete = piece.text, b"", False
        if answer.grammar and piece.stop_string is None:
            answer.grammar.feed(tokens.token_ids)
            mask = b"" if tokens.last else answer.grammar.mask()
            complete = answer.grammar.is_complete if tokens.last else not mask
        if (tokens.last or complete) and piece.stop_string is None:
            piece = answer.text.finish()
            text += piece.text
        return AnswerText(
            tokens.request,
            tokens.choice,
            text,
            piece.token_count,
            piece.stop_string,
            tokens.last,
            self._tokenizer.spell(tokens.spell),
            mask,
            complete,
        )

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if prompt.kind == "token_ids":
            token_ids = token_ids_of_frame(prompt.payload)
        else:
            language = prompt.rules.source
            token_ids = self._ids_of(prompt.kind, prompt.payload, language=language)
        if len(token_ids) > self._context_length:
            raise ContextLengthExceeded(too_long_text(len(token_ids), self._context_length))
        return token_ids

    def _first(self, rules: TextRules) -> TokenId | None:
        """Return the token that is to be the first of an answer; None: any may be."""
        if rules.target:
            return self._tokenizer.languages.token_of(rules.target, "target_language")
        return self._tokenizer.id_of(rules.first) if rules.first else None

    def _ids_of(
        self,
        kind: Literal["text", "chat"],
        payload: bytes,
        *,
        special: bool = True,
        language: str = "",
    ) -> list[int]:
        """Return the token ids of a text or a conversation, however many."""
        if kind == "chat":
            try:
                chat = codec.decode_chat(payload)
            except RemoteProtocolError as exc:
                raise InvalidRequest(f"The conversation cannot be read: {exc}.") from exc
            return self._tokenizer.encode_chat(chat)
        try:
            text = payload.decode()
        except UnicodeDecodeError as exc:
            raise InvalidRequest(f"The prompt is not UTF-8: {exc}.") from exc
        if not language:
            return self._tokenizer.encode(text, special=special)
        bare = self._tokenizer.encode(text, special=False)
        return self._tokenizer.languages.surround(bare, language)


def _first_mask(answer: _Answer) -> bytes:
    if answer.grammar is None:
        return b""
    mask = answer.grammar.mask()
    if not mask:
        raise InvalidRequest("The grammar admits no answer but the empty one.")
    return mask


def _has_grammar(order: Prompt | Question) -> bool:
    return isinstance(order, Prompt) and order.rules.grammar is not None


def _bug(request: int, what: str) -> Failed:
    return Failed(request=request, code=TextError.code, message=f"{what}. Please report it.")
