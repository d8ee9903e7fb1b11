"""Small tokenizers of the kinds that models have, made here, with transformers as the reference."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distributed_llm.coordinator.text.tokenizer import Tokenizer

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


every_kind = pytest.mark.parametrize("kind", KINDS)
texts = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("hel stop👩‍👧é́你好\n")))
