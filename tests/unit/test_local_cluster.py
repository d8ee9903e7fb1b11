"""What `LocalCluster` refuses before anything is served."""

from typing import Any

import pytest

from distributed_llm import ConfigError, LocalCluster


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
