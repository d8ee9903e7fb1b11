"""The tokenizer: prompts as transformers encodes them, answers in pieces that join exactly."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distributed_llm.common.errors import CheckpointError, InvalidRequest
from distributed_llm.common.messages import ChatMessage
from distributed_llm.coordinator.tokenizer import Detokenizer, Tokenizer

TEXT = "Hello world, the quick brown fox.\n\n Größe naïve 你好 👩‍👩‍👧 é done</s> stop STOP"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SPECIAL = [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
ADDED = [AddedToken("<tool call>", special=False)]  # a space: not in the byte-level alphabet


def byte_level() -> Backend:
    """GPT-2's kind, with tokens that cut characters in the middle."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())

    def letters(text: bytes) -> str:
        return "".join(BYTES[b] for b in text)

    merged = [
        b"th",
        b"he",
        b"the",
        b"\xe4\xbd",
        b"\xa0\xe5",
        b"\xf0\x9f",
        b"\xe2\x80",
        b" \xe2\x80",
        b"\x8d\xf0",
    ]
    merged += [b"st", b"op", b"stop", b" w", b"\n\n"]
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    merges = []
    for token in merged:
        half = next(
            k
            for k in range(1, len(token))
            if letters(token[:k]) in vocab and letters(token[k:]) in vocab
        )
        merges.append((letters(token[:half]), letters(token[half:])))
        vocab[letters(token)] = len(vocab)
    backend = Backend(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return finished(backend)


def _gpt2_bytes() -> dict[int, str]:
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


BYTES = _gpt2_bytes()


def byte_fallback() -> Backend:
    """Llama 2's kind: characters outside the vocabulary become a run of byte tokens."""
    words = ["▁", "e", "l", "o", "h", "▁h", "el", "▁w", "w", "s", "t", "p", "st", "op", "stop", "ö"]
    vocab = {"<unk>": 0} | {f"<0x{i:02X}>": i + 1 for i in range(256)}
    vocab |= {word: 257 + i for i, word in enumerate(words)}
    merges = [("▁", "h"), ("e", "l"), ("▁", "w"), ("s", "t"), ("o", "p"), ("st", "op")]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return finished(backend)


def unigram() -> Backend:
    """T5's kind."""
    words = ["▁", "▁he", "llo", "▁w", "orld", "s", "top", "▁stop", "o", "h", "e", "l", "é", "👩"]
    backend = Backend(models.Unigram([("<unk>", 0.0), *((w, -1.0) for w in words)], 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return finished(backend)


def finished(backend: Backend) -> Backend:
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(ADDED)
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    backend.enable_truncation(4)  # a leftover of training that must not cut prompts
    backend.enable_padding(length=64, pad_id=bos, pad_token="<s>")
    return backend


KINDS: dict[str, Callable[[], Backend]] = {
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
    "unigram": unigram,
}


def save(folder: Path, backend: Backend, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **config
    )
    wrapped.save_pretrained(folder)
    return folder


@cache
def folder_of(kind: str) -> Path:
    return save(Path(mkdtemp()), KINDS[kind](), chat_template=TEMPLATE)


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return Tokenizer.load(folder_of(kind))


@cache
def reference_of(kind: str) -> Any:
    return AutoTokenizer.from_pretrained(folder_of(kind))


def pieces_of(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    texts = [detokenizer.feed([token]).text for token in ids]
    return [*texts, detokenizer.finish().text]


every_kind = pytest.mark.parametrize("kind", KINDS)
texts = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("hel stop👩‍👧é́你好\n")))


# ------------------------------------------------------------------ encode


@every_kind
@given(text=texts)
@settings(max_examples=100, deadline=None)
def test_encodes_as_transformers_does(kind: str, text: str) -> None:
    assert tokenizer_of(kind).encode(text) == reference_of(kind)(text)["input_ids"]


@every_kind
@given(ids=st.lists(st.integers(0, 400), max_size=40))
@settings(max_examples=100, deadline=None)
def test_decodes_as_transformers_does(kind: str, ids: list[int]) -> None:
    expected = reference_of(kind).decode(ids, skip_special_tokens=True)
    assert tokenizer_of(kind).decode(ids) == expected


def test_a_long_prompt_is_not_cut() -> None:
    assert len(tokenizer_of("byte-level").encode("x" * 1000)) == 1001


def test_half_a_surrogate_pair_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="Unicode"):
        tokenizer_of("byte-level").encode("\ud83d")


# ------------------------------------------------------------------ chat


@every_kind
def test_chat_is_rendered_and_encoded_as_transformers_does(kind: str) -> None:
    turns = [("system", "be brief"), ("user", "hello é")]
    expected = reference_of(kind).apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        add_generation_prompt=True,
        return_dict=False,
    )
    messages = [ChatMessage(role=role, content=content) for role, content in turns]  # type: ignore[arg-type]
    assert tokenizer_of(kind).encode_chat(messages) == expected


def chat_with(tmp_path: Path, template: str | None) -> list[int]:
    folder = save(tmp_path / "chat", byte_level(), chat_template=template)
    return Tokenizer.load(folder).encode_chat([ChatMessage(role="user", content="hi")])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('only poems') }}", "only poems"),
        ("{{ messages.nothing.here }}", "refuses"),
        ("{{ 1 / 0 }}", "refuses"),
        ("{% for", "refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
        ("{{ 'x' * 1000000 }}", "1000000 characters"),
        ("{{ raise_exception('x' * 9999) }}", "^.{,600}$"),
    ],
)
def test_what_a_template_may_do_wrong(tmp_path: Path, template: str | None, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        chat_with(tmp_path, template)


def test_a_template_may_refuse_a_role() -> None:
    with pytest.raises(InvalidRequest, match="no tools"):
        tokenizer_of("byte-level").encode_chat([ChatMessage(role="tool", content="x")])


def test_an_empty_conversation_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        tokenizer_of("byte-level").encode_chat([])


def test_many_short_turns_are_not_too_long() -> None:
    turns = [ChatMessage(role="user", content="")] * 2000
    assert tokenizer_of("byte-level").encode_chat(turns)


# ------------------------------------------------------------------ files


def test_a_folder_without_tokenizer_serves_ids_only(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        Tokenizer.load(tmp_path)
    tokenizer = Tokenizer.open(tmp_path)
    assert not tokenizer.available
    with pytest.raises(InvalidRequest, match="token ids"):
        tokenizer.encode("hello")
    with pytest.raises(InvalidRequest, match="token ids"):
        tokenizer.encode_chat([ChatMessage(role="user", content="hello")])
    with pytest.raises(InvalidRequest, match="stop strings"):
        Detokenizer(tokenizer, ["x"])
    detokenizer = Detokenizer(tokenizer)
    piece = detokenizer.feed([1, 2, 3])
    assert (piece.text, piece.token_count, piece.stopped) == ("", 3, False)
    assert detokenizer.finish().text == ""


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 3}', "\ud83d", "[" * 10**5])
def test_a_broken_tokenizer_is_a_checkpoint_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["m.Evil", None]}, ["m.Evil", None]])
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, auto_map: Any) -> None:
    folder = save(tmp_path / "model", byte_level())
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    (folder / "m.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    tokenizer = Tokenizer.open(folder)  # of tokenizer.json, which needs no code
    assert tokenizer.decode(tokenizer.encode("the world")) == "the world"
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(CheckpointError, match="never run"):
        Tokenizer.open(folder)
    assert not (tmp_path / "ran").exists()


def test_the_older_pair_of_files_is_read_too(tmp_path: Path) -> None:
    model = json.loads(byte_level().to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"] | {"<|endoftext|>": 400}))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(m) for m in model["merges"]))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the world")) == "the world"


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
    assert "".join(p.text for p in [*pieces, last]) == tokenizer.decode(ids)
    assert (last.token_count, last.stopped) == (len(ids), False)


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
        assert "".join(pieces_of(Detokenizer(tokenizer), ids)) == tokenizer.decode(ids)


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


def test_the_cost_of_a_token_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    original = Tokenizer.decode

    def counting(self: Tokenizer, ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return original(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    for kind in KINDS:
        tokenizer = tokenizer_of(kind)
        decoded.clear()
        detokenizer = Detokenizer(tokenizer, ["never to be found"])
        ids = tokenizer.encode("hello é stop ") * 400
        detokenizer.feed(ids)
        assert sum(decoded) < 40 * len(ids)
    decoded.clear()
    Detokenizer(tokenizer_of("byte-level")).feed([0x80] * 4000)
    assert max(decoded) <= 20


# ------------------------------------------------------------------ stop strings


def oracle(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str]) -> tuple[str, int, bool]:
    """The plain way: decode every beginning of the answer in full and look."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        starts = [text.find(stop) for stop in stops if stop in text]
        if starts:
            return text[: min(starts)], count, True
    return tokenizer.decode(ids), len(ids), False


def check_stops(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str], batch: int) -> None:
    text, count, stopped = oracle(tokenizer, ids, stops)
    detokenizer = Detokenizer(tokenizer, stops)
    shown = ""
    for i in range(0, len(ids), batch):
        piece = detokenizer.feed(ids[i : i + batch])
        shown += piece.text
        assert text.startswith(shown)
        assert piece.stopped == (stopped and i + batch >= count)
    last = detokenizer.finish()
    assert (shown + last.text, last.token_count, last.stopped) == (text, count, stopped)


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
    stop = st.one_of(cut, cut.map(lambda s: s + "s"), st.text("stop h\n", min_size=1, max_size=5))
    stops = data.draw(st.lists(stop, min_size=1, max_size=4))
    check_stops(tokenizer, ids, stops, data.draw(st.integers(1, 5)))


def test_a_beginning_of_a_stop_string_waits_and_is_given_out_when_it_was_none() -> None:
    tokenizer = tokenizer_of("byte-level")
    detokenizer = Detokenizer(tokenizer, ["sts!"])
    ids = [reference_of("byte-level").backend_tokenizer.token_to_id(c) for c in "aststx"]
    assert [detokenizer.feed([i]).text for i in ids] == ["a", "", "", "", "st", "stx"]


def test_a_stop_string_within_a_token_counts_that_token() -> None:
    tokenizer = tokenizer_of("byte-level")
    ids = tokenizer.encode("xstop he")[1:]
    piece = Detokenizer(tokenizer, ["to"]).feed(ids)
    assert (piece.text, piece.token_count, piece.stopped) == ("xs", 2, True)


def test_a_line_break_made_of_byte_tokens_stops_at_once() -> None:
    tokenizer = tokenizer_of("byte-fallback")
    ids = tokenizer.encode("he\n\nlo")[1:]
    piece = Detokenizer(tokenizer, ["\n\n"]).feed(ids)
    assert (piece.text, piece.stopped) == ("he", True)
    assert tokenizer.decode(ids[: piece.token_count]) == "he\n\n"


def test_after_a_stop_nothing_comes() -> None:
    tokenizer = tokenizer_of("byte-level")
    detokenizer = Detokenizer(tokenizer, ["s"])
    before = detokenizer.feed(tokenizer.encode("hes"))
    assert before.stopped
    assert detokenizer.feed(tokenizer.encode("more")).text == ""
    assert detokenizer.finish().token_count == before.token_count
