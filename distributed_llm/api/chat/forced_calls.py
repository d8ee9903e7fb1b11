"""The grammar of an answer that must call tools."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from distributed_llm.common.grammar import Grammar

_ANY = {"type": "object"}

_COMPACT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""How JSON is written: small models would write space without end."""


def calls_grammar(tools: Sequence[Mapping[str, Any]], *, several: bool) -> Grammar:
    """Return the grammar of a JSON list of calls.

    It is the same for all models, so that it needs none of their special tokens. Each tool's schema
    stands by itself, so that references in it hold.
    """
    functions = [tool["function"] for tool in tools]
    more = '(", " call)* ' if several else ""
    calls = " | ".join(f"call{number}" for number in range(len(functions)))
    lines = [f'start: "[" call {more}"]"', f"call: {calls}"]
    for number, function in enumerate(functions):
        head = f'{{"name": {_json(function["name"])}, "arguments": '
        schema = _json({**(function.get("parameters") or _ANY), "x-guidance": _COMPACT})
        lines.append(f'call{number}: {_json(head)} arguments{number} "}}"')
        lines.append(f"arguments{number}: %json {schema}")
    return Grammar("lark", "\n".join(lines))


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
