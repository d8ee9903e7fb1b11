"""What is told of both stacks of an encoder-decoder, each by its own numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from distributed_llm import summary
from distributed_llm.common.architectures import why_refused
from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.encoder_decoders import StackNames
from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.model_sizes import check_sizes
from distributed_llm.common.types import LayerRange
from tests.wire.test_status_command import worker

BART: Mapping[str, Any] = {
    "model_type": "bart",
    "d_model": 32,
    "vocab_size": 128,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
}
"""Content of a config.json."""


def test_workers_have_layers_of_an_encoder_or_of_a_decoder() -> None:
    both = worker("a", layers=LayerRange(1, 4), next_layers=LayerRange(0, 3))
    assert summary.worker_row(both, 3)[3] == "encoder 2-3, decoder 1 -> encoder 1-3"
    assert summary.worker_row(both)[3] == "2-4 -> 1-3"


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("led", "its encoder attends in blocks or windows"),
        ("fsmt", "vocabularies of different sizes"),
        ("prophetnet", "several streams"),
        ("nllb-moe", "what others ask at the same time"),
        ("whisper", "pictures or sound"),
        ("encoder-decoder", "models of any types"),
        ("some-other", "an encoder-decoder of another kind"),
    ],
)
def test_others_are_refused_for_what_they_do(model_type: str, why: str) -> None:
    refused = why_refused({"model_type": model_type, "is_encoder_decoder": True})
    assert refused is not None
    assert why in refused


def test_models_with_prompts_of_their_own_are_refused() -> None:
    assert why_refused({"model_type": "mvp"}) is None
    refused = why_refused({"model_type": "mvp", "use_prompt": True})
    assert refused is not None
    assert "prompts of its own" in refused


@pytest.mark.parametrize("text", ["text_model.", ""])
def test_the_text_model_of_an_encoder_of_pictures_is_all_that_is_read(text: str) -> None:
    """Older files have it without a name of its own."""
    config = {"model_type": "t5gemma2", "encoder": {"text_config": {"num_hidden_layers": 2}}}
    names = {
        f"model.encoder.{text}layers.1.mlp.up_proj.weight": "layers.1.mlp.up_proj.weight",
        "model.decoder.layers.0.mlp.up_proj.weight": "layers.2.mlp.up_proj.weight",
        f"model.encoder.{text}embed_tokens.weight": "model.shared.weight",
        f"model.encoder.{text}embed_tokens.eoi_embedding": "model.shared.eoi_embedding",
        f"model.encoder.{text}norm.weight": "model.encoder.norm.weight",
    }
    others = (
        "model.decoder.embed_tokens.eoi_embedding",
        "model.encoder.vision_tower.encoder.layers.0.mlp.fc1.weight",
        "model.encoder.multi_modal_projector.mm_soft_emb_norm.weight",
    )
    stacks = StackNames.of_files(config, [*names, *others])
    assert [stacks.of(name) for name in names] == list(names.values())
    assert all(map(stacks.holds, names))
    assert not any(map(stacks.holds, others))


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_heads_that_cannot_share_hidden_states_are_named(stack: str) -> None:
    check_sizes(BART)
    with pytest.raises(CheckpointError, match=f"{stack}_attention_heads = 5 and d_model = 32"):
        check_sizes({**BART, f"{stack}_attention_heads": 5})


@pytest.mark.parametrize(
    ("stack", "promised", "told"),
    [
        ("encoder", 4, "promises 4 layers of its encoder, .* no tensors of layer 3 of its encoder"),
        ("decoder", 4, "promises 4 layers of its decoder, .* no tensors of layer 2 of its decoder"),
    ],
)
def test_layers_that_are_missing_are_told_by_their_stack(
    stack: str, promised: int, told: str
) -> None:
    names = [f"model.encoder.layers.{i}.fc1.bias" for i in range(3)]
    names += [f"model.decoder.layers.{i}.fc1.bias" for i in range(2)]
    tensors = {name: TensorInfo(name, "a", "F32", (40,), 0, 160) for name in names}
    assert Checkpoint(Path("a"), BART, tensors).layer_prefix == "layers"
    wrong = Checkpoint(Path("a"), {**BART, f"{stack}_layers": promised}, tensors)
    with pytest.raises(CheckpointError, match=told):
        _ = wrong.layer_prefix
