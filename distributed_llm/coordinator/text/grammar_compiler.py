"""Compiles grammars by llguidance, for any vocabulary."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark

from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.grammar import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_END = b"<the end of the answer>"
"""A token that the vocabulary has in addition; llguidance allows it where a grammar is complete."""

_ERROR_CHARS = 500
"""Characters of an error message of llguidance that are passed on."""

_JSON: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
}
"""Of JSON by a schema that says nothing else: small models would write space without end."""

_LIMITS = LLParserLimits(
    max_lexer_states=20_000,  # 1 to 2 KB each, for every answer
    step_lexer_fuel=100_000,  # about 7 ms for a token
    step_max_items=20_000,
    verbose_errors=False,
)


class Vocabulary:
    """What llguidance has to know of a tokenizer.

    Args:
        tokens: bytes of each token's text, by id; of a special token, how it is written.
        special: ids of the special tokens.
        encode: returns the token ids of a text; none if they would be of another text.
    """

    bos_token_id = None

    def __init__(
        self, tokens: Sequence[bytes], special: Sequence[int], encode: Callable[[str], list[int]]
    ) -> None:
        self.eos_token_id = len(tokens)
        self.tokens = [*tokens, _END]
        self.special_token_ids = [*special, self.eos_token_id]
        self._encode = encode
        self._ids = {text: token_id for token_id, text in enumerate(tokens)}
        for token_id in special:
            self._ids.pop(tokens[token_id], None)
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        """Return the token ids of a text that must follow, as far as there are any."""
        if not isinstance(text, str):  # so that llguidance gives no bytes
            raise TypeError("only text can be encoded")
        return self._encode(text) or self._greedy(text.encode())

    def _greedy(self, text: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(text):
            ends = range(min(len(text), at + self._longest), at, -1)
            end = next((end for end in ends if text[at:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[text[at:end]])
            at = end
        return ids

    def for_llguidance(self) -> LLTokenizer:
        """Return it in the form that `compile_grammar` takes; slow for a large vocabulary."""
        return LLTokenizer(TokenizerWrapper(self))


def compile_grammar(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """Return a matcher at the beginning of an answer.

    Raises:
        InvalidRequest: with what is wrong with the grammar.
    """
    try:
        matcher = LLMatcher(tokenizer, _source(grammar), limits=_LIMITS, log_level=0)
    except ValueError as exc:
        raise wrong_grammar(str(exc)) from exc
    if matcher.is_error():
        raise wrong_grammar(matcher.get_error())
    return matcher


def wrong_grammar(why: str) -> InvalidRequest:
    """Return the error for a grammar that cannot be followed."""
    why = why.replace("<non-verbose/>", "").strip()
    if why.isidentifier():  # a word of the library's own
        why = "it refers to itself without end, or allows nothing"
    return InvalidRequest(f"The grammar cannot be followed: {why[:_ERROR_CHARS]}")


def _source(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', _JSON)
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(grammar.text, _JSON)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)
        case "gbnf":
            return LLMatcher.grammar_from_lark(_lark_of_gbnf(grammar.text))


def _lark_of_gbnf(text: str) -> str:
    try:
        return gbnf_to_lark(text)
    except Exception as exc:  # it raises whatever a wrong grammar causes
        raise wrong_grammar(f"it cannot be read as GBNF ({exc!r:.200}).") from exc
