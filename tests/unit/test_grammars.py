"""Which tokens the grammar of an answer lets come next."""

import json
import random
import re
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import numpy as np
import pytest

from distributed_llm.common.errors import InvalidRequest, StageError
from distributed_llm.common.grammar import Grammar
from distributed_llm.coordinator.events import TextRules
from distributed_llm.coordinator.text import grammar_compiler
from distributed_llm.coordinator.text import grammars as grammars_module
from distributed_llm.coordinator.text.detokenizer import Detokenizer
from distributed_llm.coordinator.text.grammar_trial import Trials
from distributed_llm.coordinator.text.grammars import AnswerGrammar, Grammars
from distributed_llm.coordinator.text.tokenizer import Tokenizer
from tests.unit.made_tokenizers import every_kind, reference_of, tokenizer_of

WORDS = Grammar("regex", "(he|stop|hello)( (he|w|o))*")
SCHEMA = {
    "type": "object",
    "properties": {"he": {"type": "integer"}, "stop": {"enum": ["lo", "é👩"]}},
    "required": ["he", "stop"],
    "additionalProperties": False,
}
BAD = [
    (Grammar("regex", "a("), "unclosed group"),
    (Grammar("json_schema", "{"), "EOF while parsing"),
    (Grammar("json_schema", '{"type": "no such type"}'), "no such type"),
    (Grammar("json_schema", '{"$ref": "http://127.0.0.1/x"}'), "retriev"),
    (Grammar("json_schema", '{"items":' * 1000 + "{}" + "}" * 1000), "recursion limit"),
    (Grammar("lark", "start: word"), "word"),
    (Grammar("gbnf", "root ::= word"), "word"),
    (Grammar("gbnf", "root ::= " + "(" * 5000), "GBNF"),
    (Grammar("regex", ""), "empty"),
]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(tokenizer_of("byte-level"))


def allowed(mask: bytes) -> list[int]:
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
    return list(map(int, np.flatnonzero(bits)))


def walk(answer: AnswerGrammar, end: int, seed: int, most: int = 400) -> list[int]:
    """Return tokens picked at random, to the end if it comes in time."""
    draw, ids = random.Random(seed), list[int]()
    while (mask := answer.mask()) and len(ids) < most:
        ids.append(draw.choice(allowed(mask)))
        if ids[-1] == end:
            break
        answer.feed(ids[-1:])
    return ids


@every_kind
def test_whatever_is_picked_the_text_matches(kind: str) -> None:
    tokenizer, end = tokenizer_of(kind), reference_of(kind).convert_tokens_to_ids("</s>")
    grammars = Grammars(tokenizer)
    for seed, answer in enumerate(grammars.begin(WORDS, [end], 20, tried=True)):
        ids = walk(answer, end, seed)
        context = tokenizer.encode("he")
        text = Detokenizer(tokenizer, TextRules(), context).feed(ids).text
        assert re.fullmatch(WORDS.text, text), text


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_json_is_read_by_its_schema(kind: str) -> None:
    tokenizer, end = tokenizer_of(kind), reference_of(kind).convert_tokens_to_ids("</s>")
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    for seed, answer in enumerate(Grammars(tokenizer).begin(grammar, [], 8, tried=True)):
        ids = walk(answer, end, seed)
        text = Detokenizer(tokenizer).feed(ids).text
        jsonschema.validate(json.loads(text), SCHEMA)
        assert answer.is_complete


def test_the_end_may_be_picked_only_where_the_grammar_is_complete(grammars: Grammars) -> None:
    tokenizer = tokenizer_of("byte-level")
    (h,), (e,) = tokenizer.encode("h")[1:], tokenizer.encode("e")[1:]
    end = 200
    (answer,) = grammars.begin(Grammar("regex", "h[eo]*"), [end, e, 10**9], 1)
    assert end not in allowed(answer.mask())
    answer.feed([h])
    assert {end, e} <= set(allowed(answer.mask()))
    (endless,) = grammars.begin(Grammar("regex", "he*"), [], 1)
    endless.feed([h])
    assert all(tokenizer.decode([token]).startswith("e") for token in allowed(endless.mask()))


def test_nothing_can_follow_on_a_grammar_that_is_complete(grammars: Grammars) -> None:
    (answer,) = grammars.begin(Grammar("regex", "he"), [5], 1)
    assert not answer.is_complete
    answer.feed(tokenizer_of("byte-level").encode("he")[1:])
    assert answer.is_complete
    assert answer.mask() == b""


def test_a_token_that_the_grammar_forbids_is_no_answer(grammars: Grammars) -> None:
    (answer,) = grammars.begin(Grammar("regex", "he"), [], 1)
    with pytest.raises(StageError, match="forbids"):
        answer.feed(tokenizer_of("byte-level").encode("x")[1:])


def test_a_special_token_that_the_grammar_names_may_come(grammars: Grammars) -> None:
    begin = reference_of("byte-level").convert_tokens_to_ids("<s>")
    (answer,) = grammars.begin(Grammar("lark", 'start: <s> "he"'), [], 1)
    assert allowed(answer.mask()) == [begin]
    for kind in ("json_object", "gbnf"):
        text = "" if kind == "json_object" else 'root ::= "{" [a-z]'
        (other,) = grammars.begin(Grammar(kind, text), [], 1)
        texts = [tokenizer_of("byte-level").decode([i]) for i in allowed(other.mask())]
        assert "{" in texts
        assert all(text.startswith("{") for text in texts)


@pytest.mark.parametrize(("grammar", "why"), BAD[:-1])
def test_a_wrong_grammar_is_refused_with_the_reason(
    grammars: Grammars, grammar: Grammar, why: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"(?s)The grammar cannot be followed: .*{why}"):
        grammars.begin(grammar, [], 1)


def test_a_grammar_that_takes_for_ever_or_ends_the_process_is_given_up() -> None:
    endless = "start: X\nX: " + " & ".join(f"/.*{i}.*/" for i in range(300))
    chain = "\n".join(f'a{i}: a{i + 1} "x"' for i in range(40_000))
    trials = Trials([], limit_s=0.5)
    for text, why in ((endless, "more than"), (f"start: a0\n{chain}\na40000: /y/", "Simplify")):
        with pytest.raises(InvalidRequest, match=why):
            trials.run(Grammar("lark", text))
    trials.run(Grammar("regex", "he"))


def test_without_a_tokenizer_there_are_no_grammars() -> None:
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        Grammars(Tokenizer(None)).begin(WORDS, [], 1)


def test_compiled_grammars_are_kept_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    original = grammar_compiler.compile_grammar

    def counting(tokenizer: Any, grammar: Grammar) -> object:
        compiled.append(grammar.text)
        return original(tokenizer, grammar)

    monkeypatch.setattr(grammar_compiler, "compile_grammar", counting)
    grammars = Grammars(tokenizer_of("byte-level"))
    for text in ("a", "b", "a", *(f"a{i}" for i in range(63)), "a", "b"):
        grammars.begin(Grammar("regex", text), [], 2, tried=True)
    assert compiled.count("a") == 1
    assert compiled.count("b") == 2
    monkeypatch.setattr(grammars_module, "_KEPT_CHARS", 100)
    grammars.begin(Grammar("regex", "a" * 200), [], 1, tried=True)  # alone, it is kept
    for _ in range(2):
        grammars.begin(Grammar("regex", "a" * 200), [], 1, tried=True)
    assert compiled.count("a" * 200) == 1
    grammars.begin(Grammar("regex", "a"), [], 1, tried=True)
    assert compiled.count("a") == 2
