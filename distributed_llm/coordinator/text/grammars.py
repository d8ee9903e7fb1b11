"""Grammars of answers: which tokens may come next."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from distributed_llm.common.errors import InvalidRequest, StageError
from distributed_llm.common.grammar import Grammar
from distributed_llm.coordinator.text.tokenizer import NO_TOKENIZER, Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from distributed_llm.coordinator.text.grammar_trial import Trials

_KEPT: Final = 64
"""Compiled grammars that are kept, those that were used last."""

_KEPT_CHARS: Final = 1 << 20
"""Characters of all of them together, unless it is one; 100,000 may take 20 MB compiled."""


class AnswerGrammar:
    """How far one answer has come in its grammar.

    Args:
        matcher: at the beginning of the answer; no other answer has it.
        ends: tokens that may be sampled where the grammar is complete, and end the answer.
        num_tokens: of the vocabulary, without the one that llguidance has for the end.
    """

    def __init__(self, matcher: "LLMatcher", ends: Sequence[int], num_tokens: int) -> None:
        self._matcher = matcher
        self._ends = frozenset(ends)
        self._num_tokens = num_tokens

    def feed(self, token_ids: Iterable[int]) -> None:
        """Take the next tokens of the answer; one that ends it is the last.

        Raises:
            StageError: the grammar does not admit one.
        """
        for token_id in token_ids:
            if token_id in self._ends:
                return
            if not self._matcher.consume_token(token_id):
                raise StageError(
                    f"A worker picked token {token_id}, which the grammar forbids. Please report "
                    "it."
                )

    @property
    def is_complete(self) -> bool:
        """Whether it is known that nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self) -> bytes:
        """Return which tokens may come next, as in `Task`; empty if the answer is complete.

        Raises:
            InvalidRequest: the grammar is too complex, or no token can go on with it.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise _wrong(self._matcher.get_error())
        allowed = np.unpackbits(bits, count=self._num_tokens, bitorder="little")
        ends = [token for token in self._ends if token < self._num_tokens]
        allowed[ends] = 0
        complete = self._matcher.is_accepting()
        if not allowed.any():
            if not complete:
                raise _wrong("no token of the vocabulary can go on with it.")
            return b""
        if complete:
            allowed[ends] = 1
        return np.packbits(allowed, bitorder="little").tobytes()


class Grammars:
    """Compiles grammars for the tokenizer of a checkpoint. Thread-safe.

    Nothing is loaded before the first grammar comes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._known: LLTokenizer | None = None
        self._num_tokens = 0
        self._trials: Trials | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def begin(
        self, grammar: Grammar, ends: Sequence[int], count: int, *, tried: bool = False
    ) -> list[AnswerGrammar]:
        """Return the beginnings of `count` answers.

        Args:
            grammar: that they follow.
            ends: tokens that may be sampled where it is complete, and end the answer.
            count: of the answers.
            tried: whether an earlier process has compiled it.

        Raises:
            InvalidRequest: the grammar is wrong or too complex, or there is no tokenizer for it.
        """
        if not self._tokenizer.available:
            raise InvalidRequest(NO_TOKENIZER.format("a grammar"))
        if not self._tokenizer.has_own_spaces:
            raise InvalidRequest(
                "This model's tokens do not say where spaces are, so no grammar can be followed. "
                "Ask without one."
            )
        with self._lock:
            known, trials = self._load()
            compiled = self._compiled.get(grammar)
        if compiled is None:
            from distributed_llm.coordinator.text.grammar_compiler import compile_grammar

            if not tried:
                trials.run(grammar)
            compiled = compile_grammar(known, grammar)
        with self._lock:
            matchers = [compiled.deep_copy() for _ in range(count)]
            self._compiled[grammar] = compiled
            self._compiled.move_to_end(grammar)
            self._forget_some()
        return [AnswerGrammar(matcher, ends, self._num_tokens) for matcher in matchers]

    def _forget_some(self) -> None:
        chars = sum(len(grammar.text) for grammar in self._compiled)
        while len(self._compiled) > 1 and (len(self._compiled) > _KEPT or chars > _KEPT_CHARS):
            grammar, _ = self._compiled.popitem(last=False)
            chars -= len(grammar.text)

    def _load(self) -> "tuple[LLTokenizer, Trials]":
        """Return the vocabulary and the trials; this takes a second for the first grammar."""
        if self._known is None or self._trials is None:
            from distributed_llm.coordinator.text.grammar_compiler import Vocabulary
            from distributed_llm.coordinator.text.grammar_trial import Trials

            spelled = self._tokenizer.vocabulary()
            special = [i for i, (_, is_text) in enumerate(spelled) if not is_text]
            vocabulary = Vocabulary(
                [written for written, _ in spelled], special, self._tokenizer.encode_inside
            )
            self._known, self._num_tokens = vocabulary.for_llguidance(), len(spelled)
            self._trials = Trials([spelled[token][0] for token in special])
        return self._known, self._trials


def _wrong(why: str) -> InvalidRequest:
    from distributed_llm.coordinator.text.grammar_compiler import wrong_grammar

    return wrong_grammar(why)
