"""The text of answers: pieces that join to what transformers decodes, and stop strings in them."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from distributed_llm.coordinator.events import TextRules
from distributed_llm.coordinator.text.detokenizer import Detokenizer
from distributed_llm.coordinator.text.tokenizer import Tokenizer
from tests.unit.made_tokenizers import (
    BYTES,
    KINDS,
    TEXT,
    every_kind,
    reference_of,
    texts,
    tokenizer_of,
)


def stopping(*stops: str) -> TextRules:
    return TextRules(stop_strings=stops)


def run_text(run: bytes) -> str:
    """Return the characters in a run of bytes, and a U+FFFD for each byte that is part of none."""
    text = run.decode(errors="surrogateescape")
    return "".join("\ufffd" if "\udc80" <= char <= "\udcff" else char for char in text)


def unfinished(run: bytes) -> int:
    """Return how many bytes at the end may be the beginning of a character."""
    for count in (3, 2, 1):
        try:
            run[-count:].decode()
        except UnicodeDecodeError as exc:
            if exc.start == 0 and exc.reason == "unexpected end of data":
                return min(count, len(run))
    return 0


def text_of(kind: str, ids: Sequence[int], *, final: bool = True) -> str:
    """Return what the reference decodes, with whole characters kept in runs of bytes.

    Args:
        final: whether no tokens follow; otherwise what may be an unfinished character is left out.
    """
    backend: Backend = reference_of(kind).backend_tokenizer
    tokenizer = tokenizer_of(kind)
    spoken = [token for token in ids if not tokenizer.is_silent(token)]
    runs: dict[str, str] = {}
    tokens: list[str] = []
    grouped = groupby(spoken, lambda token: tokenizer.byte_of(token) is not None)
    groups = [(in_run, list(members)) for in_run, members in grouped]
    for number, (in_run, group) in enumerate(groups, start=1):
        names = [str(backend.id_to_token(token)) for token in group]
        if not in_run:
            tokens += names
            continue
        run = bytes(int(name[3:-1], 16) for name in names)
        if not final and number == len(groups):
            run = run[: len(run) - unfinished(run)]
        mark = chr(0xE000 + len(runs))
        runs[mark] = run_text(run)[1:] if run[:1] == b" " and not tokens else run_text(run)
        tokens.append(mark)
    text = str(backend.decoder.decode(tokens))
    for mark, chars in runs.items():
        text = text.replace(mark, chars)
    ends_in_run = bool(groups) and groups[-1][0]
    return text if final or ends_in_run else text.removesuffix("\ufffd")


def pieces_of(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    texts = [detokenizer.feed([token]).text for token in ids]
    return [*texts, detokenizer.finish().text]


# ------------------------------------------------------------------ pieces without stop strings


@every_kind
def test_pieces_of_a_text_join_to_it_and_come_early(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(TEXT * 3)
    pieces = pieces_of(Detokenizer(tokenizer), ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert sum(map(bool, pieces)) > len(ids) / 10
    assert not any("\ufffd" in piece for piece in pieces)


@every_kind
@given(text=texts)
@settings(max_examples=300, deadline=None)
def test_pieces_of_any_text_are_whole_characters(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text)
    pieces = pieces_of(Detokenizer(tokenizer), ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@every_kind
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_pieces_of_any_tokens_join_to_their_text(kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    ids = data.draw(st.lists(st.integers(0, 290), max_size=120))
    batch = data.draw(st.integers(1, 5))
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.feed(ids[i : i + batch]) for i in range(0, len(ids), batch)]
    last = detokenizer.finish()
    assert "".join(p.text for p in [*pieces, last]) == text_of(kind, ids)
    assert (last.token_count, last.stop_string) == (len(ids), None)


@given(
    runs=st.lists(
        st.tuples(
            st.sampled_from([b"\xe4\xbd\xa0", b"\xf0\x9f\x91", b"\xbd", b"a"]), st.integers(1, 40)
        ),
        max_size=6,
    )
)
@settings(max_examples=300, deadline=None)
def test_long_runs_of_bytes_join_to_their_text(runs: list[tuple[bytes, int]]) -> None:
    content = b"".join(byte * times for byte, times in runs)
    for kind, first in (("byte-fallback", 1), ("byte-level", None)):
        tokenizer = tokenizer_of(kind)
        backend = reference_of(kind).backend_tokenizer
        ids = [first + b if first else backend.token_to_id(BYTES[b]) for b in content]
        ids.append(backend.token_to_id("e"))
        assert "".join(pieces_of(Detokenizer(tokenizer), ids)) == text_of(kind, ids)


@every_kind
@given(text=texts)
@settings(max_examples=200, deadline=None)
def test_the_oracle_decodes_as_transformers_does(kind: str, text: str) -> None:
    assume(not {"\ue000", "\ue001"} & set(text))
    ids = tokenizer_of(kind).encode(text)
    assert text_of(kind, ids) == reference_of(kind).decode(ids, skip_special_tokens=True)


def test_a_character_made_of_bytes_is_shown_as_soon_as_it_is_whole() -> None:
    tokenizer = tokenizer_of("byte-fallback")
    detokenizer = Detokenizer(tokenizer)
    ids = [1 + byte for byte in "é你👩\n".encode()]
    assert [detokenizer.feed([token]).text for token in ids] == [
        *("", "é"),
        *("", "", "你"),
        *("", "", "", "👩"),
        "\n",
    ]


def test_bytes_that_are_no_characters_do_not_take_others_with_them() -> None:
    tokenizer = tokenizer_of("byte-fallback")
    content = "é".encode() + b"\xe4\xbd" + "!你".encode() + b"\xf0\x9f"
    pieces = pieces_of(Detokenizer(tokenizer), [1 + byte for byte in content])
    assert "".join(pieces) == "é\ufffd\ufffd!你\ufffd\ufffd"


@every_kind
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_an_answer_continues_the_text_of_its_prompt(kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    start = tokenizer.encode(data.draw(texts))
    rest = data.draw(st.lists(st.integers(0, 290), max_size=30))
    detokenizer = Detokenizer(tokenizer, context=start)
    answer = "".join(pieces_of(detokenizer, rest))
    assert text_of(kind, start) + answer == text_of(kind, [*start, *rest])


def test_the_first_space_of_an_answer_is_not_lost() -> None:
    for kind in ("byte-fallback", "unigram"):
        tokenizer = tokenizer_of(kind)
        start, both = tokenizer.encode("he"), tokenizer.encode("he wo")
        assert both[: len(start)] == start
        detokenizer = Detokenizer(tokenizer, context=start)
        assert "".join(pieces_of(detokenizer, both[len(start) :])) == " wo"
        ends = [token for token in range(300) if tokenizer.special_name(token) == "</s>"]
        behind = Detokenizer(tokenizer, context=[*start, *ends * 20])
        assert "".join(pieces_of(behind, both[len(start) :])) == " wo"
        alone = Detokenizer(tokenizer)
        assert "".join(pieces_of(alone, both[len(start) :])) == "wo"


def test_a_long_context_costs_no_more_than_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("byte-fallback")
    context = tokenizer.encode("hello é ") * 2000
    decoded = counted(monkeypatch)
    Detokenizer(tokenizer, stopping("x"), context)
    assert sum(decoded) < 100


def test_tokens_that_all_end_inside_of_a_character() -> None:
    tokenizer = tokenizer_of("byte-level")
    backend = reference_of("byte-level").backend_tokenizer
    across = backend.token_to_id(BYTES[0xA0] + BYTES[0xE5])
    middle = backend.token_to_id(BYTES[0xA5])
    ids = [backend.token_to_id(BYTES[0xE5]), *[middle, across] * 100]
    pieces = pieces_of(Detokenizer(tokenizer), ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert sum(map(bool, pieces)) >= 100


def test_special_tokens_do_not_push_text_out_of_the_window() -> None:
    tokenizer = tokenizer_of("byte-fallback")
    he = tokenizer.encode("he")[1:]
    ids = [*he, *[tokenizer.encode("")[0]] * 30, *he]
    assert "".join(pieces_of(Detokenizer(tokenizer), ids)) == tokenizer.decode(ids) == "he he"


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the number of tokens is added whenever some are decoded."""
    decoded: list[int] = []
    original = Tokenizer.decode

    def counting(self: Tokenizer, ids: Sequence[int], **how: bool) -> str:
        decoded.append(len(ids))
        return original(self, ids, **how)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    return decoded


def test_the_cost_of_a_token_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = counted(monkeypatch)
    for kind in KINDS:
        tokenizer = tokenizer_of(kind)
        decoded.clear()
        detokenizer = Detokenizer(tokenizer, stopping("never to be found"))
        ids = tokenizer.encode("hello é stop ") * 400
        detokenizer.feed(ids)
        assert sum(decoded) < 40 * len(ids)
    decoded.clear()
    Detokenizer(tokenizer_of("byte-level")).feed([0x80] * 4000)
    assert max(decoded) <= 20
    decoded.clear()
    run = [1 + byte for byte in "né你\n".encode()] * 1000
    Detokenizer(tokenizer_of("byte-fallback"), stopping("never to be found")).feed(run)
    assert sum(decoded) < 40 * len(run)


# ------------------------------------------------------------------ stop strings


def oracle(kind: str, ids: Sequence[int], stops: Sequence[str]) -> tuple[str, int, str | None]:
    """The plain way: decode every beginning of the answer in full and look."""
    tokenizer = tokenizer_of(kind)
    names: list[tuple[int, str]] = []  # of special tokens, by their place in the text
    for count in range(1, len(ids) + 1):
        text = text_of(kind, ids[:count], final=False)
        if name := tokenizer.special_name(ids[count - 1]):
            names.append((len(text), name))
        if starts := [*found_in(text, names, stops)]:
            at, number = min(starts)
            return text[:at], count, stops[number]
    text = text_of(kind, ids)
    if starts := [*found_in(text, names, stops)]:
        at, number = min(starts)
        return text[:at], len(ids), stops[number]
    return text, len(ids), None


def found_in(
    text: str, names: Sequence[tuple[int, str]], stops: Sequence[str]
) -> Iterator[tuple[int, int]]:
    """Yield where stop strings begin, in the text and in the text with special tokens."""
    chars = [(at, char) for at, char in enumerate(text)]
    for place, name in reversed(names):
        index = next((i for i, (at, _) in enumerate(chars) if at >= place), len(chars))
        chars[index:index] = [(place, char) for char in name]
    for number, stop in enumerate(stops):
        if (at := text.find(stop)) >= 0:
            yield at, number
        if (at := "".join(char for _, char in chars).find(stop)) >= 0:
            yield chars[at][0], number


def check_stops(kind: str, ids: Sequence[int], stops: Sequence[str], batch: int) -> None:
    text, count, stop = oracle(kind, ids, stops)
    detokenizer = Detokenizer(tokenizer_of(kind), stopping(*stops))
    shown = ""
    for i in range(0, len(ids), batch):
        piece = detokenizer.feed(ids[i : i + batch])
        shown += piece.text
        assert text.startswith(shown)
        if piece.stop_string is not None:
            break
    last = detokenizer.finish()
    assert (shown + last.text, last.token_count, last.stop_string) == (text, count, stop)


@every_kind
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_stop_strings_against_the_oracle(kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    words = st.lists(st.sampled_from([*"stop he", "stop", "👩", "\n", "é", "你", "‍"]), max_size=25)
    ids = data.draw(
        st.one_of(words.map("".join).map(tokenizer.encode), st.lists(st.integers(0, 290)))
    )
    text = tokenizer.decode(ids) or "x"
    cut = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 6)).map(
        lambda c: text[c[0] : c[0] + c[1]]
    )
    special = st.sampled_from(["</s>", "<s>", "s>s", "op</s>", "</s>st", "/"])
    made_up = st.text("stop h\n", min_size=1, max_size=5)
    stop = st.one_of(special, cut, cut.map(lambda s: s + "s"), made_up)
    stops = data.draw(st.lists(stop, min_size=1, max_size=4))
    check_stops(kind, ids, stops, data.draw(st.integers(1, 5)))


def test_a_beginning_of_a_stop_string_waits_and_is_given_out_when_it_was_none() -> None:
    tokenizer = tokenizer_of("byte-level")
    detokenizer = Detokenizer(tokenizer, stopping("sts!"))
    ids = [reference_of("byte-level").backend_tokenizer.token_to_id(c) for c in "aststx"]
    assert [detokenizer.feed([i]).text for i in ids] == ["a", "", "", "", "st", "stx"]


def test_a_stop_string_within_a_token_counts_that_token() -> None:
    tokenizer = tokenizer_of("byte-level")
    ids = tokenizer.encode("xstop he")[1:]
    piece = Detokenizer(tokenizer, stopping("to")).feed(ids)
    assert (piece.text, piece.token_count, piece.stop_string) == ("xs", 2, "to")


def test_a_line_break_made_of_byte_tokens_stops_at_once() -> None:
    tokenizer = tokenizer_of("byte-fallback")
    ids = tokenizer.encode("he\n\nlo")[1:]
    piece = Detokenizer(tokenizer, stopping("\n\n")).feed(ids)
    assert (piece.text, piece.stop_string) == ("he", "\n\n")
    assert tokenizer.decode(ids[: piece.token_count]) == "he\n\n"


@every_kind
def test_a_special_token_stops_without_being_shown(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    end = reference_of(kind).convert_tokens_to_ids("</s>")
    he, lo = tokenizer.encode("he")[1:], tokenizer.encode("lo")[1:]
    for stop in ("</s>", "he</s>", "/"):
        piece = Detokenizer(tokenizer, stopping(stop)).feed([*he, end, *lo])
        assert (piece.text, piece.stop_string) == ("" if "he" in stop else "he", stop)
        assert piece.token_count == len(he) + 1
    unstopped = Detokenizer(tokenizer, stopping("</s>?"))
    assert "".join(pieces_of(unstopped, [*he, end, *he])) == tokenizer.decode([*he, *he])


def test_after_a_stop_nothing_comes() -> None:
    tokenizer = tokenizer_of("byte-level")
    detokenizer = Detokenizer(tokenizer, stopping("s"))
    before = detokenizer.feed(tokenizer.encode("hes"))
    assert before.stop_string == "s"
    assert detokenizer.feed(tokenizer.encode("more")).text == ""
    assert detokenizer.finish().token_count == before.token_count


# ------------------------------------------------------------------ special tokens that are shown


@every_kind
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_special_tokens_that_are_shown_are_where_the_reference_has_them(
    kind: str, data: st.DataObject
) -> None:
    tokenizer, reference = tokenizer_of(kind), reference_of(kind)
    begin, end = reference.convert_tokens_to_ids(["<s>", "</s>"])
    words = data.draw(st.lists(texts.map(lambda text: tokenizer.encode(text)[1:]), max_size=6))
    marks = data.draw(st.lists(st.sampled_from([begin, end]), min_size=len(words)))
    ids = [token for mark, word in zip(marks, words, strict=False) for token in (mark, *word)]
    shown = Detokenizer(tokenizer, TextRules(hidden=(end,)))
    expected = reference.backend_tokenizer.decode(
        [token for token in ids if token != end], skip_special_tokens=False
    )
    assert "".join(pieces_of(shown, ids)) == expected


def test_a_stop_string_in_a_special_token_that_is_shown_ends_before_it() -> None:
    tokenizer = tokenizer_of("byte-level")
    begin = reference_of("byte-level").convert_tokens_to_ids("<s>")
    he = tokenizer.encode("he")[1:]
    rules = TextRules(stop_strings=("s>",), hidden=())
    piece = Detokenizer(tokenizer, rules).feed([*he, begin, *he])
    assert (piece.text, piece.token_count, piece.stop_string) == ("he<", len(he) + 1, "s>")
