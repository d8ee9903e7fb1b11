"""What a model takes is told of every type that is served, by its config.json alone."""

import json
from pathlib import Path

import pytest

from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.layer_states import keeps_kv
from distributed_llm.common.messages import ModelSource
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.coordinator.inspect_model import served_model
from tests.checkpoints import FAMILIES, config_of


@pytest.mark.parametrize("family", FAMILIES)
def test_every_type_can_be_served(family: str, tmp_path: Path) -> None:
    config = {**json.loads(config_of(family).to_json_string(use_diff=False)), "model_type": family}
    source = ModelSource(kind="folder", name=family)
    served = served_model(source, Checkpoint(tmp_path, config, {}), CoordinatorSettings(), {})
    assert [size > 0 for size in served.cost.layer_kv_bytes] == list(keeps_kv(config))
    assert served.cost.workspace_bytes > 0


def test_what_attends_to_nothing_has_no_short_context(tmp_path: Path) -> None:
    """Those with attention that name no limit are of old."""
    for family, tokens in (("mamba", 2**20), ("mamba2", 2**20), ("bloom", 2048)):
        config = json.loads(config_of(family).to_json_string(use_diff=False))
        config.pop("max_position_embeddings", None)
        assert Checkpoint(tmp_path, config, {}).context_length == tokens
