"""What `LocalCluster` refuses before anything is served."""

from pathlib import Path
from typing import Any

import pytest

from distributed_llm import ConfigError, LocalCluster, local_cluster


def test_each_of_its_workers_is_one_on_a_machine_with_several_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[dict[str, str]] = []

    def process(name: str, words: Any, environment: dict[str, str], *_: Any) -> str:
        started.append(environment)
        return name

    monkeypatch.setattr(local_cluster, "LocalProcess", process)
    cluster = LocalCluster(workers=0)
    monkeypatch.setattr(cluster, "_folder", tmp_path, raising=False)
    monkeypatch.setattr(cluster, "_fork_server", None, raising=False)
    cluster.add_worker()
    cluster.add_worker(device="cuda:1")
    assert [one["DLLM_WORKER__DEVICE"] for one in started] == ["fastest", "cuda:1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"coordinator": {"strateg": "even"}},
            "LocalCluster: unknown key 'coordinator.strateg'; did you mean 'strategy'?",
        ),
        (
            {"workers": [{}, {"thread": 1}]},
            "LocalCluster: unknown key 'worker.thread'; did you mean 'threads'?",
        ),
        (
            {"coordinator": {"dtype": None}},
            "LocalCluster: coordinator.dtype must be a text or a number, not None.",
        ),
        ({"workers": -1}, "LocalCluster cannot start -1 workers. Give 0 or more."),
    ],
)
def test_wrong_settings_are_told_as_they_were_given(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LocalCluster(**arguments)
    assert str(caught.value) == said
