"""What generation_config.json says: defaults of generation, and what of it is not followed. Pure.

As in transformers, the parameters of sampling apply only if `do_sample` is true, and a file that
samples without a word about `top_k` samples from 50 tokens.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from distributed_llm.common.encoder_decoders import is_encoder_decoder
from distributed_llm.common.errors import CheckpointError, InvalidRequest
from distributed_llm.common.sampling_params import MAX_EOS, CheckpointParams, SamplingParams
from distributed_llm.coordinator.model import GenerationDefaults
from distributed_llm.coordinator.requests.decoder_settings import (
    ABOUT_SOURCE,
    decoder_start,
    settings_in_config,
)

_FILE = "generation_config.json"
_CONFIG = "config.json"

_USUAL_TOP_K = 50
"""What transformers takes for `top_k` where a file does not say."""

_NO_TOP_K = -1
"""How files written for vLLM switch `top_k` off; to transformers that is 0."""

_TokenIds = Annotated[list[int], Meta(max_length=MAX_EOS)]

_REQUEST_PARAMS = (
    "max_new_tokens",
    "min_new_tokens",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
)
_REQUEST_WARPERS = ("temperature", "top_k", "top_p", "min_p", "typical_p")

_CHECKPOINT_PARAMS = (
    "min_length",
    "max_length",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "sequence_bias",
    "exponential_decay_length_penalty",
)
_CHECKPOINT_WARPERS = ("top_h", "epsilon_cutoff", "eta_cutoff")

FOLLOWED = frozenset(
    {
        "do_sample",
        "eos_token_id",
        *_REQUEST_PARAMS,
        *_REQUEST_WARPERS,
        *_CHECKPOINT_PARAMS,
        *_CHECKPOINT_WARPERS,
    }
)
"""Names that are followed."""

WITHOUT_EFFECT = frozenset(
    {
        # ids for padding and beginnings, which the tokenizer adds
        "bos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
        # how transformers computes, not what
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "disable_compile",
        "is_assistant",
        "low_memory",
        "max_cache_len",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "speculation_type",
        "target_lookbehind",
        "use_cache",
        "use_mtp",
        # what it returns besides tokens
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "renormalize_logits",
        "return_dict_in_generate",
        # only with several beams
        "early_stopping",
        "length_penalty",
        # where the file comes from
        "_from_model_config",
        "transformers_version",
    }
)
"""Names that change no token."""

OFF: Mapping[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "guidance_scale": (1, 1.0),
    "penalty_alpha": (0, 0.0),
    "diversity_penalty": (0, 0.0),
    "max_time": (),
    "stop_strings": ([],),
    "watermarking_config": (),
    "dola_layers": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "token_healing": (),
    "remove_invalid_values": (),
}
"""Names that are not followed, and the values besides null and false with which they are off."""


def generation_defaults(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    *,
    context_length: int,
    vocab_size: int,
) -> GenerationDefaults:
    """Return the generation defaults of a checkpoint.

    Values pass the limits of values from users. All end-of-sequence ids of generation_config.json
    end an answer, or those of config.json if it names none; ids outside the vocabulary (some files
    have -1) are ignored. Of an encoder-decoder without generation_config.json, config.json says it
    all.

    Args:
        config: content of config.json.
        generation_config: content of generation_config.json, empty if there is none.

    Raises:
        CheckpointError: a value in one of the files is out of range; with the file's name. Or the
            decoder of an encoder-decoder has no start.
    """
    has_source = is_encoder_decoder(config)
    file, said = _FILE, generation_config
    if has_source and not said:
        file, said = _CONFIG, settings_in_config(config, [*FOLLOWED, *OFF])
    named = said.get("eos_token_id") is not None
    eos_file, eos_source = (file, said) if named else (_CONFIG, config)
    eos_ids = _checked(_listed(eos_source.get("eos_token_id")), _TokenIds, eos_file, "eos_token_id")
    samples = bool(said.get("do_sample"))
    names = [*_REQUEST_PARAMS, *(_REQUEST_WARPERS if samples else ())]
    usual = {"temperature": 1.0, "top_k": _USUAL_TOP_K} if samples else {"temperature": 0.0}
    values = {**usual, **_given(said, names)}
    if values.get("top_k") == _NO_TOP_K:
        values["top_k"] = 0
    try:
        params = SamplingParams.from_arguments(values)
    except InvalidRequest as exc:
        raise CheckpointError(
            f"{file} of the model has a value that cannot be used. {exc} Correct the file, or "
            "take the line out."
        ) from exc
    return GenerationDefaults(
        context_length,
        vocab_size,
        tuple(token for token in eos_ids if 0 <= token < vocab_size),
        params,
        _checkpoint_params(said, file, samples=samples, has_source=has_source),
        _not_followed(said, {**OFF, **(ABOUT_SOURCE if has_source else {})}),
        decoder_start(said, config, vocab_size) if has_source else (),
    )


def _checkpoint_params(
    said: Mapping[str, Any], file: str, *, samples: bool, has_source: bool
) -> CheckpointParams:
    names = [*_CHECKPOINT_PARAMS, *(_CHECKPOINT_WARPERS if samples else ())]
    values = _given(said, [name for name in names if not has_source or name not in ABOUT_SOURCE])
    if "forced_eos_token_id" in values:
        values["forced_eos_token_id"] = _listed(values["forced_eos_token_id"])
    for name in ("epsilon_cutoff", "eta_cutoff"):
        if values.get(name) == 1:  # off, as in transformers
            del values[name]
    for name, value in values.items():
        _checked({name: value}, CheckpointParams, file, name)  # one by one: the error names it
    return msgspec.convert(values, CheckpointParams)


def _given(generation_config: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    return {
        name: generation_config[name] for name in names if generation_config.get(name) is not None
    }


def _listed(value: Any) -> Any:
    """Return a list of ids where a file may have a single one, or none."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _checked(value: Any, kind: Any, file: str, name: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        what = str(exc).partition(" - at ")[0]
        shown = value[name] if isinstance(value, dict) else value
        raise CheckpointError(
            f"{file} of the model has a value that cannot be used, {name}={shown!r:.80}: "
            f"{what[:1].lower()}{what[1:]}. Correct the file, or take the line out."
        ) from exc


def _not_followed(
    said: Mapping[str, Any], off: Mapping[str, tuple[object, ...]]
) -> tuple[str, ...]:
    names = sorted(set(said) - (FOLLOWED - off.keys()) - WITHOUT_EFFECT)
    return tuple(
        name
        for name in names
        if said[name] not in (None, False) and said[name] not in off.get(name, ())
    )
