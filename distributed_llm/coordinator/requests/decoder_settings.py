"""What generation of an encoder-decoder has beside that of other models. Pure.

Many are older than generation_config.json. Without that file, transformers takes what it would say
from config.json, which had all of it once.
"""

from collections.abc import Collection, Mapping
from typing import Any

from distributed_llm.common.errors import CheckpointError

Config = Mapping[str, Any]

_DECODER = "decoder"
"""Name of the decoder's own configuration, where each stack has one."""

_FORCES_BOS = "force_bos_token_to_be_generated"
"""How config.json forced the first token before there was `forced_bos_token_id`."""

_STARTS = ("decoder_start_token_id", "bos_token_id")

ABOUT_SOURCE: Mapping[str, tuple[object, ...]] = {
    "encoder_repetition_penalty": (1, 1.0),
    "encoder_no_repeat_ngram_size": (0,),
}
"""Names that compare the answer with the source, and the values besides null with which they are
off. They are not followed: whoever samples does not know the source."""


def settings_in_config(config: Config, names: Collection[str]) -> dict[str, Any]:
    """Return what config.json says of generation.

    Args:
        names: that settings of generation have.
    """
    known = {*names, *_STARTS}
    values = {**_given(_decoder(config), known), **_given(config, known)}
    if config.get(_FORCES_BOS):
        values["forced_bos_token_id"] = values.get("bos_token_id")
    return values


def decoder_start(said: Config, config: Config, vocab_size: int) -> tuple[int, ...]:
    """Return the tokens before the answer of an encoder-decoder.

    Args:
        said: settings of generation.
        config: the content of config.json.

    Raises:
        CheckpointError: the files do not tell, or tell of no token.
    """
    for source in (said, config, _decoder(config)):
        for name in _STARTS:
            token = source.get(name)
            if token is None:
                continue
            if type(token) is not int or not 0 <= token < vocab_size:
                raise CheckpointError(
                    f"generation_config.json or config.json of the model has {name}={token!r:.80}, "
                    f"with which its decoder starts: that is no token of its {vocab_size}. Correct "
                    "the file."
                )
            return (token,)
    raise CheckpointError(
        "Neither generation_config.json nor config.json of the model tells with which token its "
        "decoder starts. Write decoder_start_token_id into the former; the original model's has it."
    )


def _decoder(config: Config) -> Config:
    part = config.get(_DECODER)
    return part if isinstance(part, Mapping) else {}


def _given(values: Config, names: Collection[str]) -> dict[str, Any]:
    return {name: values[name] for name in values if name in names and values[name] is not None}
