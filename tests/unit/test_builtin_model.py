"""The shipped demo model, and the grammar its stories come from."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "distributed_llm" / "builtin_model"
OPENINGS = ["Once upon a time", "One day, a little fox", "Lily had a", "The old robot"]


@pytest.fixture(scope="module")
def grammar() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("story_grammar")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture
def model() -> Any:
    torch.set_num_threads(1)  # more are no quicker with a small model, and keep other tests waiting
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def generate(model: Any, tokenizer: Any, prompt: list[int], **options: Any) -> str:
    """Return prompt and continuation, special tokens included."""
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=256, **options)[0]
    text: str = tokenizer.decode(ids)
    return text


def chat_prompt(tokenizer: Any, question: str) -> list[int]:
    turns = [{"role": "user", "content": question}]
    ids: list[int] = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
    return ids


def flaws(text: str, grammar: Any) -> list[str]:
    """Return what keeps `text`, as generated, from being a whole story."""
    story = text.split("<|assistant|>")[-1].removeprefix("<|bos|>")
    faults = []
    if not story.endswith("<|eos|>") or story.count("<|") != 1:
        faults.append("does not end, or has special tokens inside")
    words = grammar.words_of(story.removesuffix("<|eos|>"))
    if not 60 <= len(words) <= 220:
        faults.append(f"{len(words)} words")
    if unknown := set(words) - grammar.lexicon():
        faults.append(f"words the grammar does not know: {sorted(unknown)}")
    names = {name.lower() for row in grammar.tables.NAMES.values() for name in row}
    if len(names & set(words)) not in (1, 2):
        faults.append(f"characters {sorted(names & set(words))}")
    if story.count("\n\n") != 2:
        faults.append("not three paragraphs")
    return faults


def test_the_folder_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(sizes) >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) <= 5_000_000


def test_the_model_can_be_split_over_six_workers_unevenly() -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] > 6
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["tie_word_embeddings"]


def test_the_grammar_repeats_with_its_seed(grammar: Any) -> None:
    one, other = Random(7), Random(7)
    assert [grammar.tell_chat(one) for _ in range(50)] == [
        grammar.tell_chat(other) for _ in range(50)
    ]
    assert grammar.tell(Random(1)) != grammar.tell(Random(2))


def test_the_grammar_hardly_ever_tells_the_same_story_twice(grammar: Any) -> None:
    rng = Random(3)
    assert len({grammar.tell(rng).text for _ in range(10_000)}) >= 9_990


def test_stories_are_made_of_the_lexicon_and_now_and_then_of_new_words(grammar: Any) -> None:
    rng, lexicon = Random(4), grammar.lexicon()
    known = [set(grammar.words_of(grammar.tell(rng).text)) <= lexicon for _ in range(2_000)]
    assert 0.75 < sum(known) / len(known) < 0.95


def test_stories_have_no_gaps_and_begin_with_a_capital(grammar: Any) -> None:
    rng = Random(5)
    for _ in range(2_000):
        text = grammar.tell(rng).text
        assert text[0].isupper()
        assert not set("{}") & set(text)
        assert "  " not in text
        sentences = text.replace('"', "").replace("\n\n", " ").split(". ")
        assert all(sentence[0].isupper() for sentence in sentences)


@pytest.mark.parametrize(
    "text", ["", "naïve café", "日本語 🦊👩‍🚀", "a\tb\r\n  c", "Ω≈ç√∫", "\x00\x7f", "It's 3.14!"]
)
def test_the_tokenizer_gives_back_any_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_chat_template_marks_every_turn(tokenizer: Any) -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " Hello! "},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "More!"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>Be kind.<|user|>Hello!<|assistant|>Hi!<|eos|><|user|>More!<|assistant|>"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
    assert len(set(ids) & set(tokenizer.all_special_ids)) == 5


@pytest.mark.parametrize("opening", OPENINGS)
def test_it_finishes_a_story_greedily(
    model: Any, tokenizer: Any, grammar: Any, opening: str
) -> None:
    text = generate(model, tokenizer, tokenizer(opening)["input_ids"], do_sample=False)
    assert flaws(text, grammar) == []


def test_it_finishes_a_story_when_sampling(model: Any, tokenizer: Any, grammar: Any) -> None:
    torch.manual_seed(0)
    prompt = tokenizer(OPENINGS[0])["input_ids"]
    texts = [generate(model, tokenizer, prompt, do_sample=True, temperature=0.7) for _ in range(3)]
    assert [flaws(text, grammar) for text in texts] == [[], [], []]
    assert len(set(texts)) == 3


@pytest.mark.parametrize(
    ("question", "topic"),
    [
        ("Tell me a story about a dragon.", "dragon"),
        ("Write about Mia and a red ball.", "Mia"),
        ("tell me a story about a fox", "fox"),
    ],
)
def test_a_chat_gets_a_story_of_the_first_character_it_asks_for(
    model: Any, tokenizer: Any, grammar: Any, question: str, topic: str
) -> None:
    text = generate(model, tokenizer, chat_prompt(tokenizer, question), do_sample=False)
    assert flaws(text, grammar) == []
    assert topic in text.split("<|assistant|>")[1]


def test_without_its_first_layer_the_model_tells_no_story(
    model: Any, tokenizer: Any, grammar: Any
) -> None:
    # Without one of the later layers it still reads well: that text is fluent does not show that
    # a pipeline ran every layer. Compare tokens for that.
    del model.model.layers[0]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers -= 1
    for opening in OPENINGS:
        prompt = tokenizer(opening)["input_ids"]
        assert flaws(generate(model, tokenizer, prompt, do_sample=False), grammar)
