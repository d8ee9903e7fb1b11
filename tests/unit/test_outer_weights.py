"""What weights outside the layers are by their names, and which stages use them."""

from collections.abc import Mapping
from typing import Any

import pytest

from distributed_llm.common.outer_weights import OuterWeights, lacks_head
from distributed_llm.common.types import LayerRange

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
IN_A_LAYER = "model.layers.0.mlp.embed_out.weight"
LAYERS = 6
FIRST, MIDDLE, LAST = LayerRange(0, 2), LayerRange(2, 4), LayerRange(4, LAYERS)


def outer(*names: str, config: Mapping[str, Any] | None = None) -> OuterWeights:
    """Return those of a decoder alone, whose files hold these beside its layers."""
    every = (*names, IN_A_LAYER)
    return OuterWeights(config or {"model_type": "llama"}, LAYERS, None, every, every)


def users(weights: OuterWeights, name: str) -> list[bool]:
    """Return whether the first, the middle and the last of three stages use a weight."""
    return [weights.is_used_by(layers, name) for layers in (FIRST, MIDDLE, LAST)]


def test_the_first_stage_embeds_and_the_last_one_has_norm_and_head() -> None:
    weights = outer(EMBEDDING, NORM, HEAD)
    assert users(weights, EMBEDDING) == [True, False, False]
    assert users(weights, NORM) == users(weights, HEAD) == [False, False, True]
    assert [weights.embeds(layers) for layers in (FIRST, MIDDLE, LAST)] == [True, False, False]
    assert not weights.ties_embeddings
    assert not weights.is_tied(EMBEDDING)
    assert weights.embedding_users == (0,)


def test_without_a_head_the_matrix_of_the_embedding_is_both() -> None:
    weights = outer(EMBEDDING, NORM)
    assert weights.ties_embeddings
    assert weights.lone_head is None
    assert weights.is_tied(EMBEDDING)
    assert not weights.is_tied(NORM)
    assert users(weights, EMBEDDING) == [True, False, False], "but for the head"
    assert weights.embedding_users == (0, LAYERS - 1)


def test_a_matrix_that_is_tied_may_be_kept_under_the_name_of_the_head() -> None:
    weights = outer(HEAD, NORM)
    assert weights.lone_head == HEAD
    assert weights.ties_embeddings
    assert weights.holds_embedding(HEAD)
    assert weights.is_tied(HEAD)
    separate = outer(HEAD, NORM, config={"model_type": "llama", "tie_word_embeddings": False})
    assert separate.lone_head is None
    assert not separate.ties_embeddings
    assert not separate.holds_embedding(HEAD)


@pytest.mark.parametrize("name", ["transformer.wpe.weight", "model.embed_positions.weight"])
def test_positions_are_embedded_but_no_head_shares_them(name: str) -> None:
    weights = outer("transformer.wte.weight", name, "transformer.ln_f.weight")
    assert weights.is_embedding(name)
    assert users(weights, name) == [True, False, False]
    assert weights.is_tied("transformer.wte.weight")
    assert not weights.is_tied(name)
    assert outer(name, HEAD).lone_head == HEAD


@pytest.mark.parametrize(
    ("name", "is_embedding"),
    [
        ("transformer.word_embeddings.weight", True),
        ("token_embd.weight", True),
        ("embed_out.weight", False),
        ("output.weight", False),
        ("model.embedding_norm.weight", False),
        ("transformer.ln_f.weight", False),
    ],
)
def test_what_is_used_before_the_first_layer_is_told_by_its_name(
    name: str, is_embedding: bool
) -> None:
    assert outer(name).is_embedding(name) == is_embedding


def test_embedding_and_head_are_both_that_if_the_files_hold_only_one() -> None:
    assert lacks_head([EMBEDDING, NORM])
    assert lacks_head([HEAD, NORM])
    assert not lacks_head([EMBEDDING, NORM, HEAD])
    assert lacks_head([EMBEDDING, IN_A_LAYER]), "what is in a layer does not count"
