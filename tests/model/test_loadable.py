"""Whether workers could load a checkpoint, as a coordinator hears it from a process that ends."""

import json
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distributed_llm.common.checkpoint import open_checkpoint
from distributed_llm.common.errors import CheckpointError, UnsupportedModel
from distributed_llm.coordinator import loadable
from distributed_llm.coordinator.loadable import ensure_loadable
from distributed_llm.worker.model.stage import Stage
from tests.checkpoints import make_checkpoint
from tests.warm import load_checks_here
from tests.wholes import edit_config


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def asked() -> Iterator[list[bytes]]:
    with load_checks_here() as asked:
        yield asked


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "caf\udce9", num_layers=2)


def test_what_is_right_is_asked_once_and_again_after_a_change(
    model: Path, asked: list[bytes]
) -> None:
    for _ in range(2):
        ensure_loadable(open_checkpoint(model))
    assert len(asked) == 1
    os.utime(model / "model.safetensors", (1, 1))
    ensure_loadable(open_checkpoint(model))
    edit_config(model, lambda config: {**config, "rms_norm_eps": 1e-3})
    ensure_loadable(open_checkpoint(model))
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"intermediate_size": 40}, CheckpointError),
        ({"model_type": "no_such"}, UnsupportedModel),
    ],
)
def test_what_is_wrong_is_said_as_a_worker_says_it_each_time(
    model: Path, asked: list[bytes], change: dict[str, Any], error: type[CheckpointError]
) -> None:
    edit_config(model, lambda config: {**config, **change})
    with pytest.raises(error) as heard:
        Stage.check_loading(open_checkpoint(model))
    for number in (1, 2):
        with pytest.raises(error) as said:
            ensure_loadable(open_checkpoint(model))
        assert (type(said.value), str(said.value)) == (type(heard.value), str(heard.value))
        assert len(asked) == number


def test_a_checkpoint_arrives_as_it_is(model: Path, asked: list[bytes]) -> None:
    edit_config(model, lambda config: {**config, "not_used": float("inf")})
    checkpoint = open_checkpoint(model).limited_to(16)
    ensure_loadable(checkpoint)
    (question,) = asked
    assert msgspec.convert(json.loads(question), loadable.Asked).checkpoint == checkpoint


@pytest.mark.parametrize("breaks", ["ends", "hangs"])
def test_without_an_answer_the_workers_are_left_to_check(
    tmp_path: Path,
    breaks: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(command: list[str], **options: Any) -> Any:
        if breaks == "hangs":
            raise subprocess.TimeoutExpired(command, 300.0)
        return subprocess.CompletedProcess(command, -9, stderr=b"Killed\n")

    monkeypatch.setattr(subprocess, "run", run)
    model = make_checkpoint(tmp_path / "model", num_layers=2)  # what is logged is sent as UTF-8
    with caplog.at_level(logging.WARNING):
        ensure_loadable(open_checkpoint(model))
    (said,) = caplog.messages
    assert "could not be checked" in said
    assert {"ends": "exit code -9: Killed", "hangs": "more than 300 s"}[breaks] in said
    assert not (Path(os.environ["DLLM_CACHE"]) / "loadable.json").exists()
