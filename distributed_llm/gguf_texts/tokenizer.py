"""Writes the tokenizer of a model in GGUF files, chat template included."""

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    convert_gguf_tokenizer,
    get_gguf_tokenizer,
)

from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.gguf_texts.cuts import patterns_of
from distributed_llm.gguf_texts.header import Header

_AS_GPT2 = frozenset(
    {
        *("gpt-2", "phi-2", "gigachat", "mellum", "jais", "olmo", "trillion", "exaone4", "a.x-4.0"),
        *("granite-docling",),
    }
)
"""How text is cut before merges, where it is cut as for GPT-2: transformers' own way here."""

_DIGITS = frozenset(
    {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"}
)
"""Where it is cut so, too, but each digit stands for itself."""

_IMPLIED = {"gptoss": "gpt-4o"}
"""How the text of architectures is cut whose files do not say it."""

_GEMMA4 = "gemma4"

_WHOLE_WORDS = frozenset(
    {
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
        *("lfm2", "jina-v5-nano", "tekken"),
    }
)
"""Where words of the vocabulary stand for themselves, whatever the merges say, and texts begin with
a special token unless the file says otherwise."""

_SHOWN_CHARS = 60
_SPACE = "\u2581"


def write_tokenizer(header: Header, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json; nothing if the files have no vocabulary.

    Raises:
        UnsupportedModel: it is of a kind that transformers does not read.
    """
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind is None or kind == "none":
        return
    try:
        architecture, content, config = get_gguf_tokenizer(str(header.files[0]))
        if architecture == _GEMMA4:
            kind = content["tokenizer_type"] = _GEMMA4  # ollama's files say llama
            config["add_bos_token"] = False  # the chat template writes it
        elif architecture in _IMPLIED:
            content["pre_tokenizer_type"] = _IMPLIED[architecture]
        backend, more = convert_gguf_tokenizer(architecture, content)
    except Exception as exc:
        raise UnsupportedModel(
            f"has a tokenizer ({str(kind)[:_SHOWN_CHARS]}) that transformers cannot read: it is "
            "damaged, or of a kind that is not known. Use a folder with the original model."
        ) from exc
    way = content.get("pre_tokenizer_type")
    if kind == "gpt2" and architecture != "gpt2":
        _cut_text(backend, way)
    if kind == "gpt2" and way in _WHOLE_WORDS:
        backend.model.ignore_merges = True
        config.setdefault("add_bos_token", True)
    if kind == "llama" and not architecture.startswith("gemma"):
        _prepend_space(backend, wanted=content.get("add_prefix_space", True))
    made: Any = PreTrainedTokenizerFast
    made(tokenizer_object=backend, **config, **more).save_pretrained(out)


def _cut_text(backend: Tokenizer, way: str | None) -> None:
    """Make a tokenizer cut text before merges as the file says."""
    if way in _DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif (patterns := patterns_of(way)) is not None:
        cuts = [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in patterns]
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, as_bytes])
    elif way in (None, "default"):
        raise UnsupportedModel(
            "does not say how its tokenizer cuts text (tokenizer.ggml.pre): it was made by an old "
            "version of llama.cpp, with which answers were worse. Use a newer file of the model."
        )
    elif way not in _AS_GPT2 and way not in GGUF_PRE_TOKENIZER_SPLITS:
        raise UnsupportedModel(
            f"has a tokenizer that cuts text in a way that is not known ({way!r}), so that the "
            "model would read other tokens than those that it has learned. Use a folder with the "
            "original model."
        )


def _prepend_space(backend: Tokenizer, *, wanted: bool) -> None:
    """Make a tokenizer of sentencepiece's kind begin texts with a space, or not, as llama.cpp does.

    What transformers makes of such a file adds none to a text that begins with one.
    """
    spaces = normalizers.Replace(" ", _SPACE)
    before = [normalizers.Prepend(_SPACE)] if wanted else []
    backend.normalizer = normalizers.Sequence([*before, spaces])
    backend.pre_tokenizer = None
    after = [decoders.Strip(" ", 1, 0)] if wanted else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
