"""Grammars: what an answer has to look like."""

from typing import Any, Literal, get_args

import msgspec

from distributed_llm.common.errors import InvalidRequest

GrammarKind = Literal["json_object", "json_schema", "regex", "lark", "gbnf"]

MAX_GRAMMAR_BYTES = 1 << 20


class Grammar(msgspec.Struct, frozen=True):
    """What an answer has to look like.

    An answer ends where nothing can follow, even with `ignore_eos` and before `min_new_tokens`. An
    end-of-sequence token may be picked where the grammar is complete; other tokens of
    `stop_token_ids` only where the grammar admits them.

    Attributes:
        kind: "json_object" (any), "json_schema", "regex" (of the whole answer, in Rust's dialect),
            "lark" (Lark's syntax, as llguidance extends it) or "gbnf" (llama.cpp's).
        text: the schema as JSON, the expression, or the grammar; empty for "json_object".
    """

    kind: GrammarKind
    text: str = ""


def encode_grammar(grammar: Any) -> bytes:
    """Return the text of a grammar in UTF-8.

    Raises:
        InvalidRequest: it is no grammar, or too long.
    """
    kinds = get_args(GrammarKind)
    if (
        not isinstance(grammar, Grammar)
        or grammar.kind not in kinds
        or not isinstance(grammar.text, str)
    ):
        raise InvalidRequest(
            f"{grammar!r:.80} is no grammar. Give Grammar(kind, text) with one of the kinds "
            f"{', '.join(kinds)}."
        )
    if bool(grammar.text) == (grammar.kind == "json_object"):
        wanted = "has no text" if grammar.text else "needs a text"
        raise InvalidRequest(f"A grammar of kind {grammar.kind!r} {wanted}.")
    try:
        data = grammar.text.encode()
    except UnicodeEncodeError as exc:
        raise InvalidRequest(f"The grammar is not valid Unicode: {exc}.") from exc
    if len(data) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(
            f"The grammar has {len(data):,} bytes; {MAX_GRAMMAR_BYTES:,} are allowed."
        )
    return data


def decode_grammar(kind: GrammarKind, data: bytes) -> Grammar:
    """Return a grammar as `encode_grammar` wrote it.

    Raises:
        InvalidRequest: it is none, or too long.
    """
    try:
        grammar = Grammar(kind, data.decode())
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"The grammar is not UTF-8: {exc}.") from exc
    encode_grammar(grammar)
    return grammar
