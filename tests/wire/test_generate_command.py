"""`dllm generate` and `dllm status` against a coordinator that plays its part: what they print."""

import io
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from distributed_llm import generate_command
from distributed_llm.cli import app
from distributed_llm.common.errors import DeadlineExceeded, InvalidRequest
from distributed_llm.common.messages import (
    ClusterStatus,
    Generate,
    Spelling,
    ToClient,
    TokenLogprobs,
    WorkerStatus,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.types import LayerRange
from tests.fake_coordinator import FakeCoordinator, failed, finished, piece
from tests.wire.strategies import example

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that are not folded."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def coordinator() -> Iterator[FakeCoordinator]:
    with FakeCoordinator() as fake:
        yield fake


def dllm(coordinator: FakeCoordinator, verb: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, [verb, "--coordinator", coordinator.address, *arguments])


def three(request: Generate) -> list[ToClient]:
    """The first of three answers comes last."""
    return [
        piece(request, "two", 4, choice=1),
        piece(request, "on", 1, choice=0),
        piece(request, "three", 5, choice=2, end="stop"),
        piece(request, "e", 2, choice=0, index=1, end="length"),
        piece(request, "!", 3, choice=1, index=1, end="stop"),
        finished(request),
    ]


def test_answers_are_printed_one_after_the_other(coordinator: FakeCoordinator) -> None:
    coordinator.script = three
    done = dllm(coordinator, "generate", "Hi", "-n", "3", "--stats")
    assert (done.exit_code, done.stdout) == (0, "one\ntwo!\nthree\n")
    assert [done.stderr.find(f"answer {i} of 3") >= 0 for i in (1, 2, 3)] == [True] * 3
    assert "3 tokens in (2 cached), 5 out (length, stop, stop)" in done.stderr
    assert "queued 250 ms, first token after 500 ms, then 1.0 tokens/s" in done.stderr


def test_one_answer_has_no_heading(coordinator: FakeCoordinator) -> None:
    coordinator.script = lambda r: [
        piece(r, "a", 1),
        piece(r, "b", 2, index=1, end="stop"),
        finished(r),
    ]
    done = dllm(coordinator, "generate", "Hi")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "ab\n", "")


def test_what_came_before_a_failure_is_printed(coordinator: FakeCoordinator) -> None:
    coordinator.script = lambda r: [*three(r)[:4], failed(r, "deadline_exceeded", "Too late.")]
    done = dllm(coordinator, "generate", "Hi", "--n", "3", "--timeout", "1500ms")
    assert done.stdout == "one\ntwo\n"
    assert isinstance(done.exception, DeadlineExceeded)
    assert done.exception.exit_code == 4
    assert coordinator.requests[0].params.timeout_s == 1.5


def test_json_of_several_answers_is_a_list(coordinator: FakeCoordinator) -> None:
    coordinator.script = three
    done = dllm(coordinator, "generate", "Hi", "--n", "3", "--json")
    answers = json.loads(done.stdout)
    assert [(one["choice"], one["text"]) for one in answers] == [
        (0, "one"),
        (1, "two!"),
        (2, "three"),
    ]
    assert answers[0]["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 2}
    assert [one["usage"]["completion_tokens"] for one in answers] == [2, 2, 1]
    assert answers[0]["logprobs"] is None
    coordinator.script = lambda r: [piece(r, "a", 1, end="stop"), finished(r)]
    assert json.loads(dllm(coordinator, "generate", "Hi", "--json").stdout)["text"] == "a"
    assert [
        one["text"]
        for one in json.loads(dllm(coordinator, "generate", "Hi", "--json", "--n", "1").stdout)
    ] == ["a"]


def test_json_names_every_log_probability(coordinator: FakeCoordinator) -> None:
    part, end = Spelling(written=b" \xc3"), Spelling(written=b"</s>", is_text=False)
    one = TokenLogprobs(logprob=-1.5, top=((8, -0.25), (7, -1.5)), spelled=(part, end, part))
    coordinator.script = lambda r: [piece(r, "a", 7, logprobs=(one,), end="stop"), finished(r)]
    done = dllm(coordinator, "generate", "Hi", "--logprobs", "2", "--json")
    assert json.loads(done.stdout)["logprobs"] == [
        {
            "token_id": 7,
            "logprob": -1.5,
            "text": " \ufffd",
            "bytes": [32, 195],
            "top": [
                {"token_id": 8, "logprob": -0.25, "text": "</s>", "bytes": None},
                {"token_id": 7, "logprob": -1.5, "text": " \ufffd", "bytes": [32, 195]},
            ],
        }
    ]


def test_every_parameter_has_an_option_that_arrives(coordinator: FakeCoordinator) -> None:
    coordinator.script = lambda r: [
        piece(r, "", 1, logprobs=(TokenLogprobs(logprob=-1.0),), end="stop"),
        piece(r, "", 1, choice=1, logprobs=(TokenLogprobs(logprob=-1.0),), end="stop"),
        finished(r),
    ]
    numbers = {
        "max_new_tokens": 5,
        "min_new_tokens": 2,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.25,
        "typical_p": 0.75,
        "no_repeat_ngram_size": 3,
        "logprobs": 0,
        "n": 2,
        "seed": 7,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in numbers.items()]
    flags += ["--stop", "a", "--stop", "b", "--ignore-eos", "--timeout", "1500ms", "--json"]
    flags += ["--fit-context"]
    flags += ["--bad-words-ids", "5,9", "--bad-words-ids", "4", "--suppress-tokens", "1, 2"]
    flags += ["--logit-bias", "5=-1.5", "--logit-bias", "6=2", "--eos-token-id", "3,8"]
    flags += ["--stop-token-ids", "9", "--show-special-tokens", "--forced-bos-token-id", "de_DE"]
    flags += ["--source-language", "en_XX", "--target-language", "de_DE"]
    done = dllm(coordinator, "generate", "Hi", *flags)
    assert done.exit_code == 0
    arrived = msgspec.to_builtins(coordinator.requests[0].params)
    assert arrived == {
        **numbers,
        "stop_strings": ("a", "b"),
        "ignore_eos": True,
        "fit_context": True,
        "timeout_s": 1.5,
        "bad_words_ids": ((5, 9), (4,)),
        "suppress_tokens": (1, 2),
        "forced_bos_token_id": "de_DE",
        "source_language": "en_XX",
        "target_language": "de_DE",
        "logit_bias": {5: -1.5, 6: 2.0},
        "eos_token_id": (3, 8),
        "stop_token_ids": (9,),
        "skip_special_tokens": False,
    }
    assert arrived.keys() == set(SamplingParams.__struct_fields__) - {"trace"}


def test_a_first_token_may_be_an_id(coordinator: FakeCoordinator) -> None:
    coordinator.script = lambda r: [piece(r, "", 1, end="stop"), finished(r)]
    assert dllm(coordinator, "generate", "Hi", "--forced-bos-token-id", "12").exit_code == 0
    assert coordinator.requests[0].params.forced_bos_token_id == 12


def test_a_model_without_a_tokenizer_is_asked_with_token_ids(coordinator: FakeCoordinator) -> None:
    coordinator.script = lambda r: [
        piece(r, "", 7, 8),
        piece(r, "", 9, index=2, end="stop"),
        finished(r),
    ]
    done = dllm(coordinator, "generate", "--token-ids", "1, 5,9")
    assert (done.exit_code, done.stdout.split()) == (0, ["7", "8", "9"])
    assert coordinator.prompts == [[np.array([1, 5, 9], "<i4").tobytes()]]
    assert coordinator.requests[0].prompt == "token_ids"


@pytest.mark.parametrize("ids", ["1,two", "", "1;2", "1.5"])
def test_what_are_no_token_ids(coordinator: FakeCoordinator, ids: str) -> None:
    done = dllm(coordinator, "generate", "--token-ids", ids)
    assert (done.exit_code, coordinator.requests) == (2, [])
    assert "write them as 1,5,9" in done.stderr


def test_at_a_terminal_it_says_what_it_waits_for(
    coordinator: FakeCoordinator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO(b"typed"), "utf-8"))
    assert generate_command._text_prompt(None) == "typed"
    assert "Type the prompt; Ctrl-" in capsys.readouterr().err
    assert generate_command._text_prompt("given") == "given"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"pi\r\nped"), "utf-8"))
    assert generate_command._text_prompt("-") == "pi\nped"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--token-ids", "1,5"), "give either a prompt or token ids"),
        (("--logprobs", "2"), "give --json too"),
        (("--timeout", "soon"), "write seconds, or a unit as in 500ms"),
        (("--n", "two"), "--n"),
        (("--logit-bias", "5"), "write it as 5=-1.5"),
        (("--logit-bias", "x=1"), "write it as 5=-1.5"),
        (("--bad-words-ids", "5;9"), "write them as 1,5,9"),
        (("--suppress-tokens", ""), "write them as 1,5,9"),
    ],
)
def test_wrong_usage_is_told(
    coordinator: FakeCoordinator, arguments: tuple[str, ...], said: str
) -> None:
    done = dllm(coordinator, "generate", "Hi", *arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert coordinator.requests == []


def test_what_no_request_may_say_is_told(coordinator: FakeCoordinator) -> None:
    for arguments in (("--n", "0"), ("--timeout", "0"), ("--presence-penalty", "101")):
        done = dllm(coordinator, "generate", "Hi", *arguments)
        assert isinstance(done.exception, InvalidRequest)
        assert (done.stdout, coordinator.requests) == ("", [])


def worker(**fields: Any) -> WorkerStatus:
    plain = example(WorkerStatus)
    assert isinstance(plain, WorkerStatus)
    return msgspec.structs.replace(plain, note="", next_layers=None, **fields)


STATUS = msgspec.structs.replace(
    example(ClusterStatus),
    state="serving",
    kv_tokens=4096,
    kv_tokens_used=1234,
    most_texts=0,
    encoder_layers=6,
    prefix_hit_tokens=777,
    preemptions=5,
    workers=(
        worker(name="pc", epoch=11, link="direct", layers=LayerRange(0, 4)),
        worker(name="mac", epoch=12, link="relayed", layers=LayerRange(4, 8)),
        worker(name="spare", epoch=0, link="", layers=None, state="idle"),
    ),
)


def test_status_shows_memory_links_and_plans() -> None:
    with FakeCoordinator(status=STATUS) as coordinator:
        done = dllm(coordinator, "status")
        document = json.loads(dllm(coordinator, "status", "--json").stdout)
    assert done.exit_code == 0
    assert "1,234 of 4,096 tokens of context in use" in done.stdout
    assert "777 tokens of prompts were in the KV cache already" in done.stdout
    assert "answers gave their memory up to others 5 times" in done.stdout
    rows = {
        cells[0]: cells[2:5]
        for line in done.stdout.splitlines()
        if len(cells := re.split(r"\s{2,}", line.strip())) > 5
    }
    assert rows == {
        "worker": ["plan", "layers", "link"],
        "pc": ["11", "encoder 1-4", "direct"],
        "mac": ["12", "encoder 5-6, decoder 1-2", "relayed"],
        "spare": ["-", "-", "-"],
    }
    assert (document["kv_tokens_used"], document["prefix_hit_tokens"]) == (1234, 777)
    assert [one["link"] for one in document["workers"]] == ["direct", "relayed", ""]
