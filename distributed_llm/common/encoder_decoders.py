"""Encoder-decoders, as config.json and names of tensors tell: T5, BART and their kin.

An encoder reads a *source*; a decoder writes the answer, and sees the source as the encoder's last
layer left it. The layers of both are numbered as one list, the encoder's first, so that stages may
begin and end anywhere. A sequence is the source and, after it, what the decoder reads: at positions
of the source, decoder layers keep the keys and values of cross-attention; after them, their own.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from distributed_llm.common.errors import CheckpointError

Config = Mapping[str, Any]

BIASED = frozenset({"mt5", "switch_transformers", "t5"})
"""Types whose first layers hold the bias of relative positions of all layers of their stack."""

_WITHOUT_PREFIX = frozenset({"mt5", "switch_transformers", "t5", "umt5"})
"""Types of which transformers has the stacks in the model itself, not in one of its parts."""

_KEEPS_FLOAT32 = frozenset({"mt5", "t5", "umt5"})

_APART = frozenset({"t5gemma"})
"""Types whose stacks embed tokens by matrices of their own."""

_IN_PARTS = frozenset({*_APART, "t5gemma2"})
"""Types whose config.json describes each stack by itself."""

STACK_TYPES: Mapping[str, Mapping[str, str]] = {
    "t5gemma": {"encoder": "t5_gemma_module", "decoder": "t5_gemma_module"},
    "t5gemma2": {"encoder": "t5gemma2_text", "decoder": "t5gemma2_decoder"},
}
"""By the model type, those of stacks that are described by themselves."""

_TEXT = "text_config"
"""Where the text model is described of an encoder that reads pictures as well."""

_COMPUTED_POSITIONS = frozenset({"m2m_100", "marian", "pegasus"})
"""Types whose positions are sines and cosines, which some files have as if they were weights."""

ENCODER_DECODERS = frozenset(
    {
        *BIASED,
        *_WITHOUT_PREFIX,
        *_IN_PARTS,
        *("bart", "mbart", "mvp", "plbart", "pegasus", "marian", "m2m_100"),
        *("blenderbot", "blenderbot-small"),
    }
)
"""Model types that can be served."""

_COUNTS = {
    "encoder": ("encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers", "num_layers", "num_hidden_layers"),
}
"""Names of the numbers of layers."""

_OWN_SIZES = ("decoder_attention_heads", "decoder_ffn_dim")
"""Names of sizes in which decoders may differ from encoders, which have them under like names."""

_EXPERT_STEPS = ("encoder_sparse_step", "decoder_sparse_step")
"""Names of numbers of layers of which one has experts."""

STACK_SIZES = (
    *("d_model", "d_kv", "d_ff", "num_heads"),
    *("encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim"),
)
"""Names of sizes that only encoder-decoders have under these."""

_LAYER = re.compile(
    r"^(?:model\.|transformer\.)?(?P<stack>encoder|decoder)\.(?:text_model\.)?(?:block|layers)"
    r"\.(?P<layer>\d+)\.(?P<rest>.+)$"
)
_OUTSIDE = re.compile(
    r"^(?:model\.|transformer\.)?(?P<stack>encoder|decoder|shared)\.(?:text_model\.)?(?P<rest>.+)$"
)
_OF_PICTURES = re.compile(r"^(model\.)?encoder\.(vision_tower|multi_modal_projector)\.")
_BIAS_IN_LAYER = "layer.0.SelfAttention.relative_attention_bias.weight"
_BIAS = "relative_attention_bias.weight"
_EMBEDDING = "embed_tokens.weight"
_SHARED = "shared.weight"
_EMBEDS = ("weight", "eoi_embedding")
"""What a matrix of embeddings consists of: T5Gemma 2 has the end of a picture beside it."""

_EMBEDDINGS = tuple(f"{name}.{part}" for name in ("embed_tokens", "shared") for part in _EMBEDS)
_BEFORE_LAYERS = re.compile(r"\.(embed_tokens|embed_positions|layernorm_embedding)\.")

PATH = "layers"
"""Where the layers of both stacks are in a model."""


def is_encoder_decoder(config: Config) -> bool:
    """Return whether a model has an encoder and a decoder, both of which are served."""
    return config.get("model_type") in ENCODER_DECODERS


def encoder_layers(config: Config) -> int:
    """Return how many layers the encoder has; 0: the model is a decoder alone.

    Raises:
        CheckpointError: it is no possible number.
    """
    return _count(config, "encoder") if is_encoder_decoder(config) else 0


def decoder_layers(config: Config) -> int:
    """Return how many layers the decoder of an encoder-decoder has.

    Raises:
        CheckpointError: it is no possible number.
    """
    return _count(config, "decoder")


def check_stacks(config: Config) -> None:
    """Raise if the stacks cannot be made, where transformers would not name the value at fault.

    Raises:
        CheckpointError: heads of a stack cannot share its hidden states evenly, or it is not told
            which of its layers have experts.
    """
    for name in _EXPERT_STEPS:
        every = config.get(name)
        if name in config and (type(every) is not int or every < 0):
            raise CheckpointError(
                f"config.json has {name} = {every!r:.60}; it must be a number from 0 on, for every "
                "so many layers have experts. Copy that of the original model."
            )
    width = config.get("d_model")
    for name in ("encoder_attention_heads", "decoder_attention_heads"):
        heads = config.get(name)
        if type(width) is type(heads) is int and heads > 0 and width % heads:
            raise CheckpointError(
                f"config.json has {name} = {heads} and d_model = {width}, which {heads} heads "
                "cannot share evenly. Copy that of the original model."
            )


def of_stack(config: Config, num_layers: int, layer: int) -> tuple[int, int, str]:
    """Return how many layers a layer's stack has, its number there, and words for the stack.

    Args:
        config: the content of config.json.
        num_layers: of both stacks, or of a decoder alone, for which there are no words.
        layer: its number among these.
    """
    before = encoder_layers(config)
    if layer < before:
        return before, layer, " of its encoder"
    return num_layers - before, layer - before, " of its decoder" if before else ""


def of_decoder(config: Config) -> Config:
    """Return a configuration in which sizes of the decoder stand under the usual names.

    Of a model that is no encoder-decoder, it is the same.
    """
    if not is_encoder_decoder(config):
        return config
    part = stack_config(config, "decoder")
    if config.get("model_type") in _IN_PARTS and isinstance(part, Mapping):
        return {**config, **part, "model_type": config["model_type"]}
    heads = config.get("decoder_attention_heads") or config.get("num_heads")
    usual = {
        "num_attention_heads": heads,
        "head_dim": config.get("d_kv"),
        "intermediate_size": config.get("decoder_ffn_dim") or config.get("d_ff"),
        "hidden_size": config.get("d_model"),
    }
    given = {name: value for name, value in usual.items() if value is not None}
    return {**{name: config[name] for name in config if name != "n_positions"}, **given}


def stack_config(config: Config, stack: str) -> Any:
    """Return what config.json says of a stack that is described by itself: usually an object."""
    part = config.get(stack)
    return part.get(_TEXT, part) if isinstance(part, Mapping) else part


def as_decoder(config: Config) -> Config:
    """Return the configuration of an encoder-decoder whose decoder had the sizes of its encoder."""
    if config.get("model_type") in _IN_PARTS:
        return {**config, "decoder": stack_config(config, "encoder")}
    ours = {name: name.replace("decoder_", "encoder_") for name in _OWN_SIZES}
    return {**config, **{name: config.get(own, config.get(name)) for name, own in ours.items()}}


def stays_float32(config: Config, name: str) -> bool:
    """Return whether a weight is float32 in a model of float16, whatever it is to become.

    What the MLPs of T5 give exceeds float16, so transformers keeps their second matrices apart.
    """
    return config.get("model_type") in _KEEPS_FLOAT32 and name.endswith(".wo.weight")


def _count(config: Config, stack: str) -> int:
    """Return the number of layers of a stack."""
    told = stack_config(config, stack) if config.get("model_type") in _IN_PARTS else config
    if isinstance(told, Mapping):
        for name in _COUNTS[stack]:
            value = told.get(name)
            if value is None:
                continue
            if type(value) is not int or not 0 < value <= 2048:
                raise CheckpointError(
                    f"config.json has {name} = {value!r}; it must be a number of layers."
                )
            return value
    elif stack in config:
        name = f"{stack}.{_TEXT}" if isinstance(config[stack], Mapping) else stack
        raise CheckpointError(
            f"config.json has {name} = {told!r:.60}; it must be an object, which describes the "
            f"{stack}. Copy that of the original model."
        )
    raise CheckpointError(
        f"config.json of the {config.get('model_type')!r} model does not tell how many layers its "
        f"{stack} has ({', '.join(_COUNTS[stack])}). Copy that of the original model."
    )


def _outside(name: str) -> str:
    """Return the name of a tensor in a stack or of the embedding of both; empty of others."""
    match = _OUTSIDE.match(name)
    return f"{match['stack']}.{match['rest']}" if match else ""


@dataclass(frozen=True)
class StackNames:
    """How the tensors of an encoder-decoder are called in the files, and in the model.

    Attributes:
        config: the content of config.json.
        matrices: by name in the files, what embedding matrices are called in the model; those that
            are another's copy are missing.
    """

    config: Config
    matrices: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_files(cls, config: Config, names: Iterable[str]) -> "StackNames":
        """Return how the tensors with these names are called."""
        found = {rest: name for name in names if (rest := _outside(name))}
        bare = cls(config)
        kept: dict[str, str] = {}
        for part in _EMBEDS:
            owners = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
            there = [rest for owner in owners if (rest := f"{owner}.{part}") in found]
            if bare.shares_embedding:
                kept |= {found[rest]: f"{bare.prefix}shared.{part}" for rest in there[:1]}
            else:
                kept |= {found[rest]: bare.prefix + rest for rest in there}
        return cls(config, kept)

    @property
    def shares_embedding(self) -> bool:
        """Whether encoder and decoder embed tokens by one matrix."""
        if self.config.get("model_type") in _APART:
            return False
        return self.config.get("share_encoder_decoder_embeddings") is not False

    @property
    def prefix(self) -> str:
        """What names of parameters outside the layers begin with in the model."""
        return "" if self.config.get("model_type") in _WITHOUT_PREFIX else "model."

    @property
    def renames(self) -> bool:
        """Whether tensors have other names in the files."""
        return True

    def holds(self, name: str) -> bool:
        """Return whether the model has tensor `name` of the files."""
        if ".embed_positions." in name and self.config.get("model_type") in _COMPUTED_POSITIONS:
            return False
        if _OF_PICTURES.match(name):
            return False
        if not _outside(name).endswith(_EMBEDDINGS):
            return "EncDecAttention.relative_attention_bias" not in name  # in old files of T5
        return not self.matrices or name in self.matrices

    def of(self, name: str) -> str:
        """Return what a tensor of the files is called in the model."""
        if name in self.matrices:
            return self.matrices[name]
        if match := _LAYER.match(name):
            stack, layer, rest = match["stack"], int(match["layer"]), match["rest"]
            if rest == _BIAS_IN_LAYER and self.config.get("model_type") in BIASED:
                return f"{stack}.{_BIAS}"
            before = 0 if stack == "encoder" else encoder_layers(self.config)
            return f"{PATH}.{before + layer}.{rest}"
        rest = _outside(name)
        return self.prefix + rest if rest else name

    def is_of_every_stage(self, name: str) -> bool:
        """Return whether every stage has a parameter outside the layers."""
        return name.endswith(_BIAS)

    def users_of(self, name: str) -> tuple[int, ...]:
        """Return the layers of which a stage uses a parameter outside the layers.

        Any stage with one of them does; as a tied head, the last one as well.

        Args:
            name: in the model.
        """
        first = encoder_layers(self.config)
        stop = first + decoder_layers(self.config)
        rest = name.removeprefix(self.prefix)
        if rest.startswith("shared."):
            return self.embedding_users
        in_encoder = rest.startswith("encoder.")
        if not in_encoder and not rest.startswith("decoder."):
            return (stop - 1,)
        if _BEFORE_LAYERS.search(rest):
            return (0,) if in_encoder else (first,)
        return (first - 1,) if in_encoder else (stop - 1,)

    @property
    def embedding_users(self) -> tuple[int, ...]:
        """The layers of which a stage embeds tokens by the decoder's matrix."""
        first = encoder_layers(self.config)
        return (0, first) if self.shares_embedding else (first,)

    def is_embedding(self, name: str) -> bool:
        """Return whether a parameter outside the layers is the matrix that the decoder embeds by.

        Args:
            name: in the model.
        """
        own = _SHARED if self.shares_embedding else f"decoder.{_EMBEDDING}"
        return name == self.prefix + own
