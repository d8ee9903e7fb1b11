"""Tokenizers as models have them: read from their files, streamed, and larger or smaller than they.

Whatever transformers' `AutoTokenizer` makes of the same files is right.
"""

import json
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from distributed_llm.client.prompts import encode_chat
from distributed_llm.common.codec import decode_chat
from distributed_llm.common.errors import CheckpointError, InvalidRequest
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.coordinator.events import TextRules
from distributed_llm.coordinator.requests.parameters import unknown_token
from distributed_llm.coordinator.text.detokenizer import Detokenizer
from distributed_llm.coordinator.text.tokenizer import Tokenizer
from tests.unit.fake_model import MODEL
from tests.unit.made_tokenizers import TEMPLATE, TEXT, byte_level, finished, save

PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
WORDS = ["▁", "▁▁", "e", "l", "o", "h", "▁h", "el", "▁w", "w", "s", "t", "p", "st", "op", "ö", "é"]
BYTE_NAMES = [f"<0x{byte:02X}>" for byte in range(256)]
TEKKEN_SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]
TEXTS = [
    TEXT,
    "  two  spaces and more   ",
    " é\n\n你好 12345 👩‍👩‍👧!",
    "hello",
    "\N{COMBINING ACUTE ACCENT}x\t",
]


def split_by_pattern() -> Backend:
    """Llama 3's and Qwen's kind: bytes in words that a pattern finds."""
    backend = byte_level()
    backend.model.ignore_merges = True
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return backend


def fallback_without_prefix() -> Backend:
    """Gemma's kind: byte fallback, and no space before a text."""
    vocab = {"<unk>": 0} | {name: 1 + i for i, name in enumerate([*BYTE_NAMES, *WORDS])}
    merges = [("▁", "▁"), ("▁", "h"), ("e", "l"), ("▁", "w"), ("s", "t"), ("o", "p")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True))
    backend.model.byte_fallback = True
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return finished(backend)


def unigram_with_bytes() -> Backend:
    """The kind of many models trained with sentencepiece's Unigram."""
    pieces = [("<unk>", 0.0), *((name, -9.0) for name in BYTE_NAMES), *((w, -1.0) for w in WORDS)]
    backend = Backend(models.Unigram(pieces, 0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return finished(backend)


def save_tekken(folder: Path, **change: Any) -> Path:
    """Write Mistral's own kind, as transformers reads it without Mistral's package."""
    longer = [b"th", b"he", b"the", b"\xe4\xbd", b"\xa0\xe5", b" w", b"\xf0\x9f", b"\x8d\xf0"]
    pieces = [*(bytes([byte]) for byte in range(256)), *longer]
    content = {
        "config": {
            "pattern": PATTERN,
            "default_vocab_size": len(pieces) + 8,
            "default_num_special_tokens": 8,
        },
        "vocab": [
            {"rank": rank, "token_bytes": b64encode(piece).decode(), "token_str": None}
            for rank, piece in enumerate(pieces)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": name, "is_control": True}
            for rank, name in enumerate(TEKKEN_SPECIAL)
        ],
        **change,
    }
    (folder / "tekken.json").write_text(json.dumps(content))
    (folder / "config.json").write_text('{"model_type": "mistral3"}')
    return folder


MADE: dict[str, Callable[[Path], Path]] = {
    "split-by-pattern": lambda folder: save(folder, split_by_pattern()),
    "fallback-without-prefix": lambda folder: save(folder, fallback_without_prefix()),
    "unigram-with-bytes": lambda folder: save(folder, unigram_with_bytes()),
    "tekken": save_tekken,
}
every_kind = pytest.mark.parametrize("kind", MADE)


@cache
def opened(kind: str) -> tuple[Tokenizer, Any]:
    """Return a tokenizer, and what transformers makes of its files."""
    folder = MADE[kind](Path(mkdtemp()))
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


# ------------------------------------------------------------------ text and tokens


@every_kind
@pytest.mark.parametrize("text", TEXTS)
def test_answers_cut_anywhere_join_to_what_transformers_decodes(kind: str, text: str) -> None:
    tokenizer, reference = opened(kind)
    ids = tokenizer.encode(text, special=False)
    assert ids == reference(text, add_special_tokens=False)["input_ids"]
    wanted = reference.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids) == wanted
    for cut in range(len(ids) + 1):
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.feed(ids[:cut]), detokenizer.feed(ids[cut:]), detokenizer.finish()]
        assert "".join(piece.text for piece in pieces) == wanted
        assert not any("\ufffd" in piece.text for piece in pieces)
        continued = Detokenizer(tokenizer, context=ids[:cut])
        answer = continued.feed(ids[cut:]).text + continued.finish().text
        assert wanted.endswith(answer)
        before = tokenizer.decode(ids[:cut])
        if not before.endswith("\ufffd"):  # the cut is between characters
            assert before + answer == wanted
    one_by_one = Detokenizer(tokenizer)
    assert "".join(one_by_one.feed([token]).text for token in ids) + one_by_one.finish().text == (
        wanted
    )


@every_kind
def test_prompts_begin_as_the_files_say(kind: str) -> None:
    tokenizer, _ = opened(kind)
    assert tokenizer.encode("hello")[1:] == tokenizer.encode("hello", special=False)
    assert tokenizer.special_name(tokenizer.encode("hello")[0]) == "<s>"
    end = tokenizer.end_token
    assert end is not None
    assert tokenizer.special_name(end) == "</s>"


@every_kind
def test_the_bytes_of_tokens_join_to_the_text(kind: str) -> None:
    tokenizer, _ = opened(kind)
    text = "h é 你 👩"
    ids = tokenizer.encode(text, special=False)
    joined = b"".join(one.written for one in tokenizer.spell(ids) if one).decode()
    assert joined.removeprefix(" ") == text


# ------------------------------------------------------------------ more ids than tokens


@every_kind
def test_ids_that_no_token_has_are_silent(kind: str) -> None:
    """A model's vocabulary is often padded: any of these may be sampled."""
    tokenizer, _ = opened(kind)
    padding = [5_000, 2**31 - 1] * 10
    ids = tokenizer.encode("h é 你", special=False)
    wanted = tokenizer.decode(ids)
    for cut in range(len(ids) + 1):
        padded = [*padding, *ids[:cut], *padding, *ids[cut:], *padding]
        assert tokenizer.decode(padded) == tokenizer.text_of(padded, special=True) == wanted
        for rules in (TextRules(), TextRules(stop_strings=("never",), hidden=(2,))):
            detokenizer = Detokenizer(tokenizer, rules)
            text = "".join(detokenizer.feed([token]).text for token in padded)
            assert text + detokenizer.finish().text == wanted
    assert set(tokenizer.spell(padding)) == {None}


def test_a_tokenizer_may_have_more_tokens_than_its_model() -> None:
    tokenizer, _ = opened("split-by-pattern")
    end = tokenizer.end_token
    assert end is not None

    def ends_with(vocab_size: int) -> tuple[int, ...]:
        """Return what ends answers of a model with so many tokens."""
        model = replace(MODEL, defaults=replace(MODEL.defaults, vocab_size=vocab_size))
        return model.with_tokenizer(tokenizer.facts()).defaults.eos_token_ids

    assert ends_with(end) == MODEL.defaults.eos_token_ids
    assert ends_with(end + 1) == (*MODEL.defaults.eos_token_ids, end)
    without, with_it = (tokenizer.encode(text, special=False) for text in ("hi", "hi</s>"))
    assert unknown_token(without, SamplingParams(), end) is None
    assert str(unknown_token(with_it, SamplingParams(), end)) == (
        f"Token id {end} is not in the model's vocabulary of {end}. A tokenizer may have more "
        "tokens than its model; leave out what this one stands for."
    )


# ------------------------------------------------------------------ files of Mistral's


def test_an_older_tekken_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"older kind.*pip install mistral-common"):
        Tokenizer.load(save_tekken(tmp_path, special_tokens=None))


def test_a_broken_tekken_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.load(save_tekken(tmp_path, vocab=3))


def test_a_tekken_without_template_says_what_to_install(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    chat = decode_chat(encode_chat(messages).frames[0])
    folder = save_tekken(tmp_path)
    with pytest.raises(InvalidRequest, match=r"pip install mistral-common.*chat_template.jinja"):
        Tokenizer.load(folder).encode_chat(chat)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + TEMPLATE)
    tokenizer = Tokenizer.load(folder)
    wanted = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, bos_token="<s>", add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.encode_chat(chat) == wanted
    assert wanted[0] == tokenizer.encode("")[0]
