"""Tokenizers of encoder-decoders: read from the files that models have, encoded and decoded.

Whatever transformers' `AutoTokenizer` makes of the same files is right.
"""

import random
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import transformers
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from distributed_llm.common.encoder_decoders import ENCODER_DECODERS
from distributed_llm.common.errors import CheckpointError, InvalidRequest
from distributed_llm.common.grammar import Grammar
from distributed_llm.common.messages import Chat, ChatMessage
from distributed_llm.common.tensors import token_ids_of_frame
from distributed_llm.coordinator.events import TextRules
from distributed_llm.coordinator.text.detokenizer import Detokenizer
from distributed_llm.coordinator.text.grammars import Grammars
from distributed_llm.coordinator.text.messages import (
    Answered,
    AnswerTokens,
    Encoded,
    Failed,
    Prompt,
    Tokens,
)
from distributed_llm.coordinator.text.source_tokenizers import class_name
from distributed_llm.coordinator.text.tokenizer import Tokenizer
from distributed_llm.coordinator.text.work import TextWork
from tests.unit.made_source_tokenizers import MADE, folder_of, folder_with

pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
every_kind = pytest.mark.parametrize("kind", MADE)

TEXTS = [
    "Hello world, doesn't it ? Größe 你 stop .",
    "  two  spaces\n\nand 👩‍👧 ' more '  ",
    ">>deu<< she 's gone ,they 've  n't",
]


@cache
def opened(kind: str) -> tuple[Tokenizer, Any]:
    """Return a tokenizer, and what transformers makes of its files."""
    folder = folder_of(kind)
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


def streamed(tokenizer: Tokenizer, ids: list[int], hidden: tuple[int, ...] | None = None) -> str:
    """Return the text of an answer, token by token."""
    detokenizer = Detokenizer(tokenizer, TextRules(hidden=hidden))
    return "".join(detokenizer.feed([i]).text for i in ids) + detokenizer.finish().text


def answers(kind: str, reference: Any) -> list[list[int]]:
    """Return answers that a model may give: texts, and tokens that make none."""
    texts = [reference(text_target=text)["input_ids"] for text in TEXTS]
    if kind in ("bart", "blenderbot", "t5gemma"):  # bytes that are no UTF-8 are another matter
        return texts
    chosen = random.Random(kind)
    known = len(reference.target_encoder) if "two vocabularies" in kind else len(reference)
    return [*texts, *([chosen.randrange(known) for _ in range(30)] for _ in range(6))]


@every_kind
def test_sources_are_encoded_as_by_transformers(kind: str) -> None:
    tokenizer, reference = opened(kind)
    assert tokenizer.has_source
    for text in [*TEXTS, ""]:
        assert tokenizer.encode(text) == reference(text)["input_ids"]
        bare = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text, special=False) == bare


@every_kind
def test_answers_are_decoded_as_by_transformers(kind: str) -> None:
    tokenizer, reference = opened(kind)
    for ids in answers(kind, reference):
        wanted = reference.decode(ids, skip_special_tokens=True)
        assert streamed(tokenizer, ids) == wanted
        assert tokenizer.text_of(ids, special=False) == wanted
        assert tokenizer.text_of(ids, special=True) == reference.decode(ids)
    text = reference(text_target=TEXTS[0])["input_ids"]
    assert streamed(tokenizer, text, hidden=()) == reference.decode(text)


@every_kind
def test_the_class_is_that_of_transformers(kind: str) -> None:
    tokenizer, reference = opened(kind)
    assert type(tokenizer._hugging_face) is type(reference)


@pytest.mark.parametrize("model_type", sorted(ENCODER_DECODERS))
def test_the_usual_class_is_that_of_transformers(model_type: str) -> None:
    usual = getattr(transformers, class_name({"model_type": model_type}, {}))
    wanted = TOKENIZER_MAPPING_NAMES.get(model_type, "GemmaTokenizer")  # T5Gemma 2's files name it
    assert usual is getattr(transformers, str(wanted))


@pytest.mark.parametrize(
    ("model_type", "named", "name"),
    [
        ("t5", None, "T5Tokenizer"),
        ("mbart", "MBart50TokenizerFast", "MBart50Tokenizer"),
        ("m2m_100", "NllbTokenizerFast", "NllbTokenizer"),
        ("bart", "BertTokenizer", "BertTokenizer"),
        ("umt5", "T5Tokenizer", "PreTrainedTokenizerFast"),
        ("t5", "PreTrainedTokenizerFast", "PreTrainedTokenizerFast"),
        ("t5", "AutoModel", "PreTrainedTokenizerFast"),
        ("t5", 3, "T5Tokenizer"),
    ],
)
def test_a_class_is_named_by_the_files_or_usual(model_type: str, named: Any, name: str) -> None:
    config = {"model_type": model_type}
    assert class_name(config, {"tokenizer_class": named}) == name
    assert class_name({**config, "tokenizer_class": named}, {}) == name


def test_languages_of_the_source_are_those_of_the_files() -> None:
    tokenizer, _ = opened("nllb, saved")
    ids = tokenizer.encode("hello")
    assert [tokenizer.special_name(token) for token in (ids[0], ids[-1])] == ["fra_Latn", "</s>"]
    tokenizer, _ = opened("m2m_100")
    ids = tokenizer.encode("hello")
    assert [tokenizer.special_name(token) for token in (ids[0], ids[-1])] == ["__en__", "</s>"]


@every_kind
def test_languages_are_those_of_transformers(kind: str) -> None:
    """Of a source and of an answer, as in its translation pipeline; where there are none, so."""
    tokenizer, _ = opened(kind)
    work = TextWork(tokenizer, 200)
    reference: Any = AutoTokenizer.from_pretrained(folder_of(kind))
    languages = LANGUAGES.get(kind.partition(",")[0])
    if languages is None:
        assert not hasattr(reference, "_build_translation_inputs")
        told = did(work, TextRules(source="de"))
        assert isinstance(told, Failed)
        assert "no languages to choose from, so source_language" in told.message
        return
    for source, target in pairwise(languages):
        wanted = reference._build_translation_inputs(
            TEXTS[0], return_tensors=None, src_lang=source, tgt_lang=target
        )
        found = did(work, TextRules(source=source, target=target))
        assert isinstance(found, Encoded)
        assert token_ids_of_frame(found.token_ids) == wanted["input_ids"]
        assert found.first == wanted["forced_bos_token_id"] != reference.unk_token_id
    told = did(work, TextRules(target="Klingon"))
    assert isinstance(told, Failed)
    assert "no language 'Klingon', which target_language names. Among its" in told.message
    assert languages[-1] in told.message


LANGUAGES = {
    "mbart": ("de_DE", "en_XX", "ro_RO", "ar_AR"),
    "mbart50": ("en_XX", "xh_ZA", "ar_AR"),
    "plbart": ("en_XX", "python", "java"),
    "m2m_100": ("zu", "en", "af"),
    "nllb": ("eng_Latn", "fra_Latn", "deu_Latn"),
}
"""Some of those of a kind; the last is among those that an error lists."""


def did(work: TextWork, rules: TextRules) -> Encoded | Answered | Failed:
    """Return what becomes of the first of `TEXTS`."""
    prompt = Prompt(request=1, kind="text", payload=TEXTS[0].encode(), num_choices=1, rules=rules)
    work.put(prompt)
    return work.do(work.take())


def test_the_language_of_the_answer_is_given_as_it_is_written() -> None:
    for kind, written in (("nllb", "deu_Latn"), ("mbart50", "de_DE"), ("m2m_100", "__de__")):
        tokenizer, reference = opened(kind)
        token = tokenizer.id_of(written)
        assert token == reference.convert_tokens_to_ids(written)
        assert token != reference.unk_token_id
        assert streamed(tokenizer, [token]) == ""
    with pytest.raises(InvalidRequest, match=r"no token 'Klingon', which forced_bos_token_id"):
        tokenizer.id_of("Klingon")
    with pytest.raises(InvalidRequest, match="without forced_bos_token_id as a text"):
        Tokenizer(None).id_of("de_DE")


@pytest.mark.parametrize(
    ("model_type", "file", "missing"),
    [
        ("t5", "vocab.json", "spiece.model"),
        ("marian", "source.spm", "target.spm and vocab.json"),
        ("t5gemma", "vocab.json", "tokenizer.json"),
    ],
)
def test_a_tokenizer_of_which_files_are_missing_is_not_an_empty_one(
    model_type: str, file: str, missing: str
) -> None:
    folder = folder_with(model_type, {file: {}})
    with pytest.raises(CheckpointError, match=f"for which {missing} must be there"):
        Tokenizer.open(folder)


def test_without_a_tokenizer_a_source_is_token_ids(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(folder_with("t5", {}))
    assert (tokenizer.available, tokenizer.has_source) == (False, True)
    assert not Tokenizer.open(tmp_path).has_source


@every_kind
def test_what_is_known_of_a_tokenizer(kind: str) -> None:
    tokenizer, reference = opened(kind)
    facts = tokenizer.facts()
    assert (facts.available, facts.chat_template) == (True, None)
    assert facts.end_token == reference.eos_token_id
    assert facts.special_tokens["eos_token"] == reference.eos_token


def test_a_conversation_is_refused() -> None:
    tokenizer, _ = opened("t5")
    with pytest.raises(InvalidRequest, match=r"no chat template.*Send the prompt as text"):
        tokenizer.encode_chat(Chat(messages=(ChatMessage(role="user", content="hello"),)))


@pytest.mark.parametrize("kind", ["text", "token_ids"])
def test_an_answer_is_a_text_of_its_own(kind: Literal["text", "token_ids"]) -> None:
    tokenizer, reference = opened("mt5")
    source = reference("Hello")["input_ids"]
    payload = b"Hello" if kind == "text" else np.array(source, np.int32).tobytes()
    work = TextWork(tokenizer, 64)
    rules = TextRules(first="</s>")
    work.put(Prompt(request=1, kind=kind, payload=payload, num_choices=1, rules=rules))
    done = work.do(work.take())
    assert isinstance(done, Encoded)
    assert (token_ids_of_frame(done.token_ids), done.context, done.first) == (source, (), 1)
    (piece,) = work.texts(Tokens(answers=(AnswerTokens(1, 0, tuple(source), True),))).pieces
    assert piece.text == "Hello"  # no space before it, as within a text


@pytest.mark.parametrize("kind", ["marian", "marian, two vocabularies", "plbart", "byt5"])
def test_spellings_of_tokens_join_to_their_text(kind: str) -> None:
    tokenizer, reference = opened(kind)
    ids = reference(text_target="Größe Welt springt nicht", add_special_tokens=False)["input_ids"]
    spelled = b"".join(one.written for one in tokenizer.spell(ids) if one)
    assert spelled.decode().removeprefix(" ") == reference.decode(ids)


# ------------------------------------------------------------------ grammars


@pytest.mark.parametrize("kind", ["mt5", "marian", "m2m_100", "plbart", "byt5"])
def test_an_answer_follows_its_grammar(kind: str) -> None:
    tokenizer, _ = opened(kind)
    end = tokenizer.encode("")[-1]
    (grammar,) = Grammars(tokenizer).begin(Grammar("regex", "(stop|Größe) the quick"), [end], 1)
    chosen, ids = random.Random(1), list[int]()
    while mask := grammar.mask():
        bits = [byte >> bit & 1 for byte in mask for bit in range(8)]
        ids.append(chosen.choice([token for token, bit in enumerate(bits) if bit]))
        if ids[-1] == end:
            break
        grammar.feed(ids[-1:])
    assert streamed(tokenizer, ids) in ("stop the quick", "Größe the quick")


def test_tokens_that_others_part_follow_no_grammar() -> None:
    tokenizer, _ = opened("blenderbot-small")
    with pytest.raises(InvalidRequest, match=r"do not say where spaces are.*Ask without one"):
        Grammars(tokenizer).begin(Grammar("regex", "a"), [2], 1)
