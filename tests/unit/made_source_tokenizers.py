"""Small tokenizers of encoder-decoders in the files that models have, made here.

What sentencepiece makes of a few sentences stands for vocabularies of models.
"""

import io
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers
from transformers import (
    AutoTokenizer,
    M2M100Tokenizer,
    PreTrainedTokenizerFast,
    T5Tokenizer,
)

from tests.unit.made_tokenizers import byte_level

ENGLISH = [
    "Hello world, the quick brown fox jumps over it.",
    "She doesn't say it's ours, they've gone; hello there!",
    "Größe naïve 你好 é done stop STOP 12345",
]
GERMAN = ["Guten Tag Welt, der schnelle Fuchs springt nicht.", "Sie sagt, es sei Größe und Welt!"]
SPECIAL = ("<unk>", "<s>", "</s>")


@cache
def trained(sentences: tuple[str, ...], kind: str = "unigram", **options: Any) -> bytes:
    """Return a model of sentencepiece, of as many pieces as the sentences have."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 4),
        model_writer=out,
        model_type=kind,
        vocab_size=110,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return out.getvalue()


def pieces_of(model: bytes) -> list[str]:
    """Return the pieces of a model, without its special ones."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    return [piece for piece in pieces if piece not in SPECIAL]


def folder_with(model_type: str, files: dict[str, Any], **tokenizer_config: Any) -> Path:
    """Return a new folder with files: bytes, or what becomes JSON."""
    folder = Path(mkdtemp())
    configs = {"config.json": {"model_type": model_type}, "tokenizer_config.json": tokenizer_config}
    for name, content in {**configs, **files}.items():
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(raw)
    return folder


def english() -> bytes:
    return trained(tuple(ENGLISH))


def t5_pieces(**options: Any) -> bytes:
    return trained(tuple(ENGLISH), pad_id=0, eos_id=1, unk_id=2, bos_id=-1, **options)


def saved(model_type: str, tokenizer: Any) -> Path:
    """Return a new folder as transformers saves a tokenizer."""
    folder = folder_with(model_type, {})
    tokenizer.save_pretrained(folder)
    return folder


def old_t5() -> Path:
    return folder_with("mt5", {"spiece.model": t5_pieces()}, tokenizer_class="T5Tokenizer")


def new_t5(**options: Any) -> Path:
    return saved("t5", T5Tokenizer.from_pretrained(old_t5(), **options))


def bart() -> Path:
    model = json.loads(byte_level().to_str())["model"]
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    vocab = {piece: i for i, piece in enumerate([*special, *model["vocab"]])}
    return folder_with(
        "bart",
        {"vocab.json": vocab, "merges.txt": merges_file(map(" ".join, model["merges"]))},
        tokenizer_class="BartTokenizer",
    )


def blenderbot() -> Path:
    return folder_with("blenderbot", {name: (bart() / name).read_bytes() for name in BPE_FILES})


BPE_FILES = ("vocab.json", "merges.txt")


def merges_file(merges: Iterable[str]) -> bytes:
    return "\n".join(["#version: 0.2", *merges, ""]).encode()


def blenderbot_small() -> Path:
    letters = sorted(set("".join(ENGLISH).lower()) - {" "})
    special = ["__null__", "__start__", "__end__", "__unk__", "__newln__"]
    pieces = [*letters, *(f"{letter}@@" for letter in letters), "he@@", "hello", "hell@@", "lo"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*special, *pieces]))}
    merges = merges_file(["h e", "l o</w>", "l l", "he ll", "hell o</w>"])
    return folder_with("blenderbot-small", {"vocab.json": vocab, "merges.txt": merges})


def mbart50() -> Path:
    return folder_with(
        "mbart", {"sentencepiece.bpe.model": english()}, tokenizer_class="MBart50Tokenizer"
    )


def mbart() -> Path:
    return folder_with(
        "mbart",
        {"sentencepiece.bpe.model": english()},
        tokenizer_class="MBartTokenizer",
        src_lang="ro_RO",
    )


def plbart() -> Path:
    return folder_with(
        "plbart",
        {"sentencepiece.bpe.model": english()},
        tokenizer_class="PLBartTokenizer",
        language_codes="base",
        src_lang="python",
    )


def pegasus() -> Path:
    pieces = trained(tuple(ENGLISH), pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    return folder_with("pegasus", {"spiece.model": pieces}, tokenizer_class="PegasusTokenizer")


def marian() -> Path:
    source, target = english(), trained(tuple(GERMAN))
    pieces = dict.fromkeys([*pieces_of(target), *pieces_of(source)])
    ordered = ["</s>", "<unk>", ">>deu<<", *pieces, "<pad>"]
    return folder_with(
        "marian",
        {
            "source.spm": source,
            "target.spm": target,
            "vocab.json": {piece: i for i, piece in enumerate(ordered)},
        },
        source_lang="eng",
        target_lang="deu",
    )


def marian_apart() -> Path:
    source, target = english(), trained(tuple(GERMAN))
    special = ["</s>", "<unk>"]
    return folder_with(
        "marian",
        {
            "source.spm": source,
            "target.spm": target,
            "vocab.json": numbered([*special, *pieces_of(source), "<pad>"]),
            "target_vocab.json": numbered([*special, *pieces_of(target), "<pad>"]),
        },
        separate_vocabs=True,
    )


def numbered(pieces: Sequence[str]) -> dict[str, int]:
    return {piece: i for i, piece in enumerate(pieces)}


def m2m_100(*, languages_are_special: bool = True) -> Path:
    pieces = numbered(["<s>", "<pad>", "</s>", "<unk>", *pieces_of(english())])
    files = {"vocab.json": pieces, "sentencepiece.bpe.model": english()}
    languages = M2M100Tokenizer.from_pretrained(folder_with("m2m_100", files)).lang_token_to_id
    return folder_with(
        "m2m_100",
        files,
        tokenizer_class="M2M100Tokenizer",
        additional_special_tokens=list(languages) if languages_are_special else [],
        tgt_lang="de",
    )


def nllb() -> Path:
    return folder_with(
        "m2m_100",
        {"sentencepiece.bpe.model": trained(tuple(ENGLISH), "bpe")},
        tokenizer_class="NllbTokenizer",
        extra_special_tokens=["eng_Latn", "fra_Latn", "deu_Latn"],
    )


def new_nllb() -> Path:
    return saved("m2m_100", AutoTokenizer.from_pretrained(nllb(), src_lang="fra_Latn"))


def t5gemma() -> Path:
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    words = ["▁", "e", "l", "o", "h", "▁h", "el", "w", "s", "t", "p", "st", "op", "ö"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", "h"), ("e", "l"), ("s", "t"), ("o", "p")]
    model = models.BPE(numbered(pieces), merges, unk_token="<unk>", fuse_unk=True)
    model.byte_fallback = True
    backend = Backend(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(special)
    return saved(
        "t5gemma",
        PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
        ),
    )


def umt5() -> Path:
    folder = new_t5()
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    content = (folder / "tokenizer.json").read_bytes()
    return folder_with("umt5", {"tokenizer.json": content}, **special)


MADE: dict[str, Callable[[], Path]] = {
    "t5": new_t5,
    "t5, spaces taken out": lambda: new_t5(clean_up_tokenization_spaces=True),
    "mt5": old_t5,
    "umt5": umt5,
    "bart": bart,
    "mbart": mbart,
    "mbart50": mbart50,
    "plbart": plbart,
    "pegasus": pegasus,
    "marian": marian,
    "marian, two vocabularies": marian_apart,
    "m2m_100": m2m_100,
    "m2m_100, languages are text": lambda: m2m_100(languages_are_special=False),
    "nllb": nllb,
    "nllb, saved": new_nllb,
    "blenderbot": blenderbot,
    "blenderbot-small": blenderbot_small,
    "t5gemma": t5gemma,
    "byt5": lambda: folder_with("t5", {}, tokenizer_class="ByT5Tokenizer"),
}


@cache
def folder_of(name: str) -> Path:
    return MADE[name]()
