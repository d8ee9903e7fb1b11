"""What an answer must look like, as OpenAI's and vLLM's clients say it. Pure."""

from typing import Any

import msgspec

from distributed_llm.api.bodies import Body
from distributed_llm.api.errors import ApiError, invalid, unsupported
from distributed_llm.common.grammar import Grammar

_KINDS = ("json", "json_object", "regex", "choice", "grammar")
"""What vLLM's `structured_outputs` may have, and with `guided_` before it, bodies."""

_BESIDES = ("disable_fallback", "disable_any_whitespace", "disable_additional_properties")
"""What else vLLM's `structured_outputs` may have; it changes no answer that is asked for here."""

_MAX_CHOICES = 1024


class GrammarFields(Body):
    """Fields of a body that say what an answer must look like."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None


GRAMMAR_FIELDS = tuple(GrammarFields.__annotations__)
"""Names of these fields."""


def grammar_of(body: GrammarFields) -> Grammar | None:
    """Return the grammar that a body asks for; None for none.

    Raises:
        ApiError: it asks for several, or for one that is none.
    """
    found = [
        *_of_response_format(body.response_format),
        *_of_structured_outputs(body.structured_outputs),
        *_of_guided(body),
    ]
    if len(found) > 1:
        raise invalid(
            f"An answer follows one grammar; {found[0][0]} and {found[1][0]} ask for two.",
            found[1][0].partition(".")[0],
        )
    return found[0][1] if found else None


_Found = list[tuple[str, Grammar]]
"""Names of fields, and the grammars in them."""


def _of_response_format(given: dict[str, Any] | None) -> _Found:
    param = "response_format"
    match given:
        case None | {"type": "text"}:
            return []
        case {"type": "json_object"}:
            return [(param, Grammar("json_object"))]
        case {"type": "json_schema", "json_schema": {"schema": dict() | bool() as schema}}:
            return [(param, _json(schema))]
        case {"type": "json_schema"}:
            raise invalid(
                "response_format has no schema. Give {"
                '"type": "json_schema", "json_schema": {"name": "...", "schema": {...}}}.',
                param,
            )
        case {"type": "grammar", "grammar": str(text)} if text:
            return [(param, _written(text))]
    kind = given.get("type")
    raise unsupported(
        param,
        f"response_format cannot be of the type {kind!r:.60}. Give text, json_object or "
        "json_schema; or structured_outputs with json, regex, choice or grammar.",
    )


def _of_structured_outputs(given: dict[str, Any] | None) -> _Found:
    param = "structured_outputs"
    found: _Found = []
    for name, value in (given or {}).items():
        if value is None or value is False or name in _BESIDES:
            continue
        if name not in _KINDS:
            raise unsupported(
                param, f"structured_outputs cannot have {name!r:.60}; give one of {_KINDS}."
            )
        found.append((f"{param}.{name}", _grammar(f"{param}.{name}", name, value)))
    return found


def _of_guided(body: GrammarFields) -> _Found:
    given = {
        "json": body.guided_json,
        "regex": body.guided_regex,
        "grammar": body.guided_grammar,
        "choice": body.guided_choice,
    }
    return [
        (f"guided_{kind}", _grammar(f"guided_{kind}", kind, value))
        for kind, value in given.items()
        if value is not None
    ]


def _grammar(param: str, kind: str, value: Any) -> Grammar:
    match kind, value:
        case "json", dict() | bool():
            return _json(value)
        case "json", str():
            try:
                return _json(msgspec.json.decode(value))
            except msgspec.DecodeError as exc:
                raise _wrong(param, f"a JSON schema: {exc}") from exc
        case "json_object", True:
            return Grammar("json_object")
        case "regex", str() if value:
            return Grammar("regex", value)
        case "grammar", str() if value:
            return _written(value)
        case "choice", [_, *_] if all(isinstance(one, str) and one for one in value):
            if len(value) > _MAX_CHOICES:
                raise _wrong(param, f"at most {_MAX_CHOICES} texts")
            texts = " | ".join(msgspec.json.encode(one).decode() for one in value)
            return Grammar("lark", f"start: {texts}")
    wanted = {
        "json": "a JSON schema",
        "json_object": "true",
        "regex": "a regular expression",
        "grammar": "a grammar, in Lark's notation or GBNF",
        "choice": "a list of texts that are not empty",
    }
    raise _wrong(param, wanted[kind])


def _json(schema: Any) -> Grammar:
    return Grammar("json_schema", msgspec.json.encode(schema).decode())


def _written(text: str) -> Grammar:
    """Return a grammar in whichever notation it is: GBNF defines by `::=`, Lark by a colon."""
    return Grammar("gbnf" if "::=" in text else "lark", text)


def _wrong(param: str, wanted: str) -> ApiError:
    return invalid(f"{param} must be {wanted}.", param, "invalid_value")
