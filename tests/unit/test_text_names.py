"""The tensors of a text model are found among those of other parts, by their names alone."""

from collections.abc import Iterator

import pytest

from distributed_llm.common.text_names import text_names

LAYERS = 3


def layers(prefix: str, count: int = LAYERS) -> Iterator[str]:
    return (f"{prefix}.{layer}.mlp.weight" for layer in range(count))


PICTURES = {
    "gemma3": (
        "language_model.model",
        ["language_model.lm_head.weight"],
        [*layers("vision_tower.vision_model.encoder.layers"), "multi_modal_projector.norm.weight"],
    ),
    "saved today": (
        "model.language_model",
        ["lm_head.weight"],
        [*layers("model.vision_tower.layers"), "model.multi_modal_projector.norm.weight"],
    ),
    "qwen2_5_vl": (
        "model",
        ["lm_head.weight"],
        [*layers("visual.blocks"), "visual.merger.mlp.0.weight"],
    ),
    "saved below the text model": (
        "model",
        ["lm_head.weight"],
        [*layers("model.visual.blocks"), "model.image_newline", *layers("mtp.layers", 1)],
    ),
    "idefics3": (
        "model.text_model",
        ["lm_head.weight"],
        [*layers("model.vision_model.encoder.layers"), "model.connector.proj.weight"],
    ),
    "llm": ("llm.model", ["llm.lm_head.weight"], [*layers("vit.blocks"), "mlp1.0.weight"]),
    "gemma3n": (
        "model.language_model",
        ["model.language_model.lm_head.weight"],
        ["model.embed_vision.embedding.weight", *layers("model.audio_tower.conformer")],
    ),
}


@pytest.mark.parametrize("of", PICTURES)
def test_names_become_those_of_the_text_model(of: str) -> None:
    stem, heads, others = PICTURES[of]
    inside = [f"{stem}.embed_tokens.weight", *layers(f"{stem}.layers"), f"{stem}.norm.weight"]
    names = text_names([*others, *heads, *inside], LAYERS, is_part=True)
    assert not [name for name in others if names.holds(name)]
    assert all(map(names.holds, [*heads, *inside]))
    expected = ["model.embed_tokens.weight", *layers("model.layers"), "model.norm.weight"]
    assert [names.of(name) for name in inside] == expected
    assert [names.of(name) for name in heads] == ["lm_head.weight"]
    assert names == text_names([*heads, *inside], LAYERS, is_part=True)
    assert [names.of(name) for name in expected] == expected


def test_a_text_model_alone_stays_as_it_is() -> None:
    inside = [*layers("transformer.h"), "transformer.vision.weight", "anything"]
    names = text_names(inside, LAYERS, is_part=False)
    assert all(map(names.holds, inside))
    assert [names.of(name) for name in inside] == inside


def test_its_layers_decide_which_part_is_the_text_model() -> None:
    """A text model of two layers beside another of three, as in some models that draft."""
    inside = [*layers("draft.language_model.layers", 2), *layers("model.language_model.layers", 3)]
    names = text_names(inside, 3, is_part=True)
    assert [names.holds(name) for name in inside] == [False] * 2 + [True] * 3
