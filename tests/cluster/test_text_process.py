"""A coordinator with its text process: end tokens, a death of either, and Ctrl-C."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from distributed_llm import DistributedClient, LocalCluster
from tests.checkpoints import make_checkpoint
from tests.waiting import eventually
from tests.warm import checked

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

END = 1
"""The end token of the tokenizer, which is not that of the model."""

SAY_END: dict[str, Any] = {"logit_bias": {END: 1000.0}, "max_new_tokens": 5, "temperature": 0.0}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    folder = checked(
        make_checkpoint(tmp_path / "chat", num_layers=2, tokenizer=True, eos_token_id=7)
    )
    with LocalCluster(folder, workers=1) as cluster:
        yield cluster


def text_process(cluster: LocalCluster) -> psutil.Process:
    (child,) = psutil.Process(cluster.coordinator.pid).children()
    return child


def test_a_chat_ends_at_the_tokenizers_end_token_and_at_special_stop_strings(
    cluster: LocalCluster,
) -> None:
    with DistributedClient(cluster.address) as client:
        ended = client.chat(HELLO, details=True, **SAY_END)
        assert (ended.token_ids, ended.text, ended.finish_reason) == ([END], "", "stop")
        ignored = client.chat(HELLO, details=True, ignore_eos=True, **SAY_END)
        assert (ignored.token_ids, ignored.finish_reason) == ([END] * 5, "length")
        stopped = client.chat(
            HELLO, details=True, ignore_eos=True, stop_strings=["<|end|>"], **SAY_END
        )
        assert (stopped.token_ids, stopped.text, stopped.finish_reason) == ([END], "", "stop")


def test_it_is_replaced_when_it_dies_and_ends_when_the_coordinator_does(
    cluster: LocalCluster,
) -> None:
    with DistributedClient(cluster.address) as client:
        answer = client.generate("The worker", max_new_tokens=8, temperature=0.0)
        first = text_process(cluster)
        for number in (signal.SIGINT, signal.SIGTERM):
            first.send_signal(number)
        assert client.generate("The worker", max_new_tokens=8, temperature=0.0) == answer
        assert text_process(cluster) == first
        first.kill()
        second = eventually(
            lambda: [
                child
                for child in psutil.Process(cluster.coordinator.pid).children()
                if child != first
            ]
        )[0]
        assert client.generate("The worker", max_new_tokens=8, temperature=0.0) == answer
    cluster.coordinator.kill()
    second.wait(60)
