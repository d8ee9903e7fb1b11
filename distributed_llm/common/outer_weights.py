"""The weights outside a model's layers: embeddings, norms and the head, and which stages use them.

Files tell what they are by their names alone. A head that shares the matrix of the embedding is
*tied*: stages at both ends hold it.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from distributed_llm.common.encoder_decoders import StackNames
from distributed_llm.common.per_layer_inputs import lies_along, per_layer_width
from distributed_llm.common.shared_blocks import every_stage_has
from distributed_llm.common.text_names import LAYER_NAME
from distributed_llm.common.types import LayerRange

_EMBEDDING_NAME = re.compile(
    r"(^|[._])((?!embedding_norm\b)embed\w*|wte|wpe|word_embeddings\w*|project_in"
    r"|altup_proj(ections)?|(token|position)_embd|transformer\.w)(\.|$)"
)
_NEVER_TIED_NAME = re.compile(
    r"(^|\.)(wpe|embed_positions|positions_embed|project_in|embeddings_project|position_embd"
    r"|word_embeddings_layernorm|embed_tokens_per_layer|per_layer_token_embd|altup_proj(ections)?"
    r"|(position|token_type)_embeddings|embeddings\.(LayerNorm|norm))\."
)
_HEAD_NAME = re.compile(
    r"(^|\.)((lm_head|embed_out|output)\.(?!dense|layer_norm|norm|bias)|decoder\.weight$)"
    r"|^head\.weight$"
)


class OuterWeights:
    """The weights of one checkpoint outside its layers.

    Args:
        config: content of config.json, of the text model.
        num_layers: of the model.
        stacks: how an encoder-decoder calls what it has; None: the model is a decoder alone.
        tensors: names of all tensors of the files, as the text model has them.
        weights: names of all weights, likewise.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        num_layers: int,
        stacks: StackNames | None,
        tensors: Iterable[str],
        weights: Collection[str],
    ) -> None:
        self._config = config
        self._num_layers = num_layers
        self._stacks = stacks
        self._weights = weights
        outside = (name for name in tensors if not LAYER_NAME.match(name))
        self._has_head = any(map(_HEAD_NAME.search, outside))

    @cached_property
    def ties_embeddings(self) -> bool:
        """Whether the head uses the matrix of the embedding."""
        return not self._has_head or self.lone_head is not None

    @cached_property
    def lone_head(self) -> str | None:
        """The head's matrix, if the files hold the matrix that is tied under its name alone."""
        if self._config.get("tie_word_embeddings") is False:
            return None
        if any(self.is_embedding(n) and not _NEVER_TIED_NAME.search(n) for n in self._weights):
            return None
        heads = (name for name in self._weights if _HEAD_NAME.search(name))
        return next((name for name in heads if name.endswith(".weight")), None)

    def is_embedding(self, name: str) -> bool:
        """Return whether parameter `name`, outside the layers, is used before the first layer.

        Of an encoder-decoder: whether it is the matrix that its decoder embeds tokens by.
        """
        if self._stacks is not None:
            return self._stacks.is_embedding(name)
        return _EMBEDDING_NAME.search(name) is not None and not _HEAD_NAME.search(name)

    def holds_embedding(self, name: str) -> bool:
        """Return whether weight `name` of the files is needed before the first layer."""
        return self.is_embedding(name) or name == self.lone_head

    def is_tied(self, name: str) -> bool:
        """Return whether weight `name` of the files is the matrix of embedding and head."""
        tied = self.ties_embeddings and not _NEVER_TIED_NAME.search(name)
        return tied and self.holds_embedding(name)

    @cached_property
    def per_layer_width(self) -> int:
        """Numbers that each layer gets of a token id; see `per_layer_inputs`."""
        return per_layer_width(self._config)

    def is_of_every_stage(self, name: str) -> bool:
        """Return whether every stage has parameter `name`, or the part of it for its layers."""
        if self._stacks is not None:
            return self._stacks.is_of_every_stage(name)
        return every_stage_has(self._config, name)

    def is_cut(self, name: str) -> bool:
        """Return whether parameter `name`, outside the layers, has a part for each of them."""
        return self.per_layer_width > 0 and lies_along(name) is not None

    def is_used_by(self, layers: LayerRange, name: str) -> bool:
        """Return whether a stage uses parameter `name`, outside the layers, but as a tied head."""
        if self.is_of_every_stage(name):
            return True
        return any(layers.start <= user < layers.stop for user in self.users_of(name))

    def users_of(self, name: str) -> Sequence[int]:
        """Return the layers of which any stage that has one uses parameter `name`.

        The parameter is outside the layers, and not of every stage. As a tied head, it is used by
        the last stage as well.
        """
        if self._stacks is not None:
            return self._stacks.users_of(name)
        return (0,) if self.is_embedding(name) else (self._num_layers - 1,)

    @property
    def embedding_users(self) -> tuple[int, ...]:
        """The layers of which any stage that has one holds the embedding that the head may share.

        As a tied head, the last one holds it as well.
        """
        users = (0,) if self._stacks is None else self._stacks.embedding_users
        return (*users, self._num_layers - 1) if self.ties_embeddings else users

    def embeds(self, layers: LayerRange) -> bool:
        """Return whether a stage looks token ids up in the matrix that a tied head shares."""
        if self._stacks is None and self.is_of_every_stage("embed_tokens.weight"):
            return True
        starts = (0,) if self._stacks is None else self._stacks.embedding_users
        return any(layers.start <= start < layers.stop for start in starts)


def lacks_head(names: Iterable[str]) -> bool:
    """Return whether the files hold only one of embedding and head, so that both are that.

    Of a text model, what config.json says of it is not what counts: there are several places for
    it, and classes of transformers differ in which they heed.
    """
    has_head = has_embedding = False
    for name in names:
        if LAYER_NAME.match(name):
            continue
        has_head |= _HEAD_NAME.search(name) is not None
        has_embedding |= _EMBEDDING_NAME.search(name) is not None
    return not (has_head and has_embedding)
