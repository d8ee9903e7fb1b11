"""Answers that follow a grammar, from three stages, held against transformers and jsonschema."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from transformers import LogitsProcessor, LogitsProcessorList

from distributed_llm import (
    DistributedClient,
    Generation,
    Grammar,
    InvalidRequest,
    LocalCluster,
)
from tests.reference import _model, tokenizer

PROMPT = "The quick brown fox"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "ages": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 99},
            "maxItems": 3,
        },
        "kind": {"enum": ["fox", "dog"]},
    },
    "required": ["name", "ages", "kind"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"},
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))
NAMES = Grammar("regex", "(fox|dog|quick)( [a-z]{3,5}){2,4}[.!]")


class Following(LogitsProcessor):
    """Lets transformers pick what llguidance admits, by llguidance's own reading of tokenizers."""

    def __init__(self, folder: Path, source: str) -> None:
        known = from_tokenizer(tokenizer(folder))
        self.matcher = LLMatcher(known, source)
        self.num_seen: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ids = input_ids[0].tolist()
        if self.num_seen is not None:
            assert self.matcher.consume_tokens(ids[self.num_seen :])
        self.num_seen = len(ids)
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: scores.shape[-1]]
        return scores.masked_fill(torch.from_numpy(allowed == 0), float("-inf"))


def reference(folder: Path, source: str) -> list[int]:
    """Return the greedy answer of the whole model, without the end token."""
    prompt = torch.tensor([tokenizer(folder)(PROMPT).input_ids])
    end = tokenizer(folder).eos_token_id
    made = _model(folder).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=80,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=end,
        logits_processor=LogitsProcessorList([Following(folder, source)]),
    )
    ids: list[int] = made[0, prompt.shape[1] :].tolist()
    return ids[:-1] if ids[-1] == end else ids


@pytest.mark.parametrize("grammar", [JSON, NAMES], ids=["json", "regex"])
def test_greedy_answers_are_those_of_transformers(
    client: DistributedClient, checkpoint: Path, grammar: Grammar
) -> None:
    source = (
        LLMatcher.grammar_from_json_schema(grammar.text)
        if grammar is JSON
        else LLMatcher.grammar_from_regex(grammar.text)
    )
    answer = client.generate(
        PROMPT, grammar=grammar, temperature=0.0, max_new_tokens=80, details=True
    )
    assert answer.token_ids == reference(checkpoint, source)
    assert answer.finish_reason == "stop"
    if grammar is JSON:
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    else:
        assert re.fullmatch(grammar.text, answer.text)


def test_every_one_of_many_sampled_answers_follows(client: DistributedClient) -> None:
    how: dict[str, Any] = {"temperature": 1.5, "max_new_tokens": 120, "seed": 1}
    answers = client.generate(PROMPT, grammar=JSON, n=6, **how)
    for text in answers:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(answers)) == 6
    ends = client.generate(PROMPT, grammar=NAMES, n=4, ignore_eos=True, details=True, **how)
    assert all(re.fullmatch(NAMES.text, end.text) and end.finish_reason == "stop" for end in ends)
    said = [{"role": "user", "content": "Hi"}]
    assert re.fullmatch(NAMES.text, client.chat(said, grammar=NAMES, **how))
    pieces = [chunk.text for chunk in client.stream_chat(said, grammar=NAMES, **how)]
    assert "".join(pieces) == client.chat(said, grammar=NAMES, **how)
    (kept, _) = client.generate([PROMPT, "x"], grammar=NAMES, logprobs=1, details=True, **how)
    assert kept.logprobs is not None
    assert all(-1e9 < one.logprob <= 0 for one in kept.logprobs)  # of all tokens, as ever


def test_a_grammar_that_cannot_be_followed_is_refused(client: DistributedClient) -> None:
    with pytest.raises(InvalidRequest, match="unclosed group"):
        client.generate(PROMPT, grammar=Grammar("regex", "a("))
    with pytest.raises(InvalidRequest, match="the grammar"):
        client.generate(PROMPT, grammar=Grammar("regex", "a"), suppress_tokens=list(range(320)))
    with pytest.raises(InvalidRequest, match="needs a text"):
        client.generate(PROMPT, grammar=Grammar("regex"))
    with pytest.raises(InvalidRequest, match="is no grammar"):
        client.generate(PROMPT, grammar="a")
    with pytest.raises(InvalidRequest, match="1,048,576"):
        client.generate(PROMPT, grammar=Grammar("lark", "x" * (1 << 20) + "x"))
    assert client.generate(PROMPT, grammar=Grammar("regex", "fox"), max_new_tokens=9) == "fox"


def test_no_token_changes_when_a_worker_dies_in_the_middle(
    cluster: LocalCluster, checkpoint: Path
) -> None:
    grammar = Grammar("regex", "([a-z]{2,5} ){12}")
    how: dict[str, Any] = {"grammar": grammar, "max_new_tokens": 90, "seed": 3, "n": 2}
    how |= {"temperature": 1.0}
    with DistributedClient(cluster.address) as client:
        expected = client.generate(PROMPT, **how)
    with LocalCluster(checkpoint, workers=2) as other, DistributedClient(other.address) as client:
        ended: list[Generation] = []
        for number, chunk in enumerate(client.stream(PROMPT, **how)):
            if number == 20:
                other.workers[-1].kill()
            ended += [chunk.generation] if chunk.generation else []
    assert [one.text for one in ended] == expected
