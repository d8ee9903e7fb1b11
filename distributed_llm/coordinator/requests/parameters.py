"""The parameters of one request after defaults. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from distributed_llm.common.errors import ContextLengthExceeded, InvalidRequest, NotEnoughMemory
from distributed_llm.common.messages import Generate
from distributed_llm.common.sampling_params import MAX_SEED, Sampling, SamplingParams
from distributed_llm.common.types import KV_BLOCK
from distributed_llm.coordinator.model import GenerationDefaults

DEFAULT_MAX_NEW_TOKENS = 256

_MAX_BYTES_PER_TOKEN = 64
"""Of a prompt; no text comes near it on average, so what is longer need not be tokenized."""

_MIN_PROMPT_BYTES = 64 * 1024

T = TypeVar("T")


def generation_defaults(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    *,
    context_length: int,
    vocab_size: int,
) -> GenerationDefaults:
    """Return the defaults in a checkpoint's config.json and generation_config.json.

    As in transformers, sampling parameters count only if `do_sample` is true. What is no token of
    the vocabulary (some files say -1) ends nothing.

    Raises:
        InvalidRequest: a value in the files is out of range.
    """
    eos = generation_config.get("eos_token_id", config.get("eos_token_id"))
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    eos_ids = tuple(token for token in eos_ids if 0 <= token < vocab_size)
    names = ["max_new_tokens", "min_new_tokens", "repetition_penalty"]
    values: dict[str, Any] = {"temperature": 0.0}
    if generation_config.get("do_sample"):
        values["temperature"] = 1.0
        names += ["temperature", "top_k", "top_p", "min_p"]
    for name in names:
        if generation_config.get(name) is not None:
            values[name] = generation_config[name]
    params = SamplingParams.from_arguments(values)
    return GenerationDefaults(context_length, vocab_size, eos_ids, params)


@dataclass(frozen=True)
class Limits:
    """The parameters of one request after defaults.

    Attributes:
        sampling: of each answer, as a task carries it.
        eos_token_ids: tokens that end the answer; empty if they are ignored.
    """

    sampling: tuple[Sampling, ...]
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]


def wrong_prompt(message: Generate, context_length: int) -> InvalidRequest | None:
    """Return why the prompt of `message` cannot be right, before it is tokenized."""
    wanted = "int32" if message.prompt == "token_ids" else "uint8"
    limit = max(_MIN_PROMPT_BYTES, _MAX_BYTES_PER_TOKEN * context_length)
    for spec in message.tensors:
        if spec.dtype != wanted:
            return InvalidRequest(f"A {message.prompt} prompt travels as {wanted}, not {spec}.")
        if spec.nbytes > limit:
            return ContextLengthExceeded(
                f"The prompt has {spec.nbytes} bytes, which no context of {context_length} tokens "
                "can hold. Shorten it."
            )
    return None


def resolve(
    params: SamplingParams,
    defaults: GenerationDefaults,
    *,
    prompt_tokens: int,
    kv_tokens: int,
    seed: int,
) -> Limits:
    """Return the parameters of a request with `prompt_tokens` tokens.

    Args:
        params: as the user gave them.
        defaults: of the checkpoint.
        prompt_tokens: length of the prompt.
        kv_tokens: positions that a pipeline has room for.
        seed: used if the user gave none.

    Raises:
        ContextLengthExceeded: prompt and answer do not fit the model.
        NotEnoughMemory: they do not fit the cluster.
        InvalidRequest: the parameters contradict one another.
    """
    if prompt_tokens == 0:
        raise InvalidRequest("The prompt is empty. Give at least one token.")
    kv_tokens -= kv_tokens % KV_BLOCK
    room = min(defaults.context_length, kv_tokens) - prompt_tokens
    usual = defaults.params.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    max_new_tokens = params.max_new_tokens or max(1, min(usual, room))
    total = prompt_tokens + max_new_tokens
    if total > defaults.context_length:
        raise ContextLengthExceeded(
            f"The prompt has {prompt_tokens} tokens and the answer may have {max_new_tokens}; "
            f"together {total} exceed the model's context of {defaults.context_length}. Shorten "
            "the prompt or lower max_new_tokens."
        )
    if total > kv_tokens:
        raise NotEnoughMemory(
            f"Prompt and answer may take {total} positions, but the workers' memory has room for "
            f"{kv_tokens}. Add a worker, raise --max-memory, or lower max_new_tokens."
        )
    usual = min(defaults.params.min_new_tokens or 0, max_new_tokens)
    min_new_tokens = usual if params.min_new_tokens is None else params.min_new_tokens
    if min_new_tokens > max_new_tokens:
        raise InvalidRequest(
            f"min_new_tokens ({min_new_tokens}) is above max_new_tokens ({max_new_tokens})."
        )
    eos = defaults.eos_token_ids if params.eos_token_id is None else params.eos_token_id
    eos = () if params.ignore_eos else eos
    first = params.seed if params.seed is not None else seed
    return Limits(
        sampling=tuple(
            Sampling(
                **_shaping(params, defaults.params),
                presence_penalty=params.presence_penalty,
                frequency_penalty=params.frequency_penalty,
                logit_bias=tuple(params.logit_bias.items()),
                seed=(first + choice) % (MAX_SEED + 1),
                prompt_tokens=prompt_tokens,
                suppressed=eos if min_new_tokens else (),
                suppressed_before=prompt_tokens + min_new_tokens,
                logprobs=params.logprobs,
            )
            for choice in range(params.n)
        ),
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos,
    )


def _shaping(params: SamplingParams, defaults: SamplingParams) -> dict[str, Any]:
    temperature = params.temperature
    if temperature is None:
        temperature = defaults.temperature or 0.0
        shaped = any(x is not None for x in (params.top_k, params.top_p, params.min_p))
        if shaped and temperature == 0.0:
            temperature = 1.0  # who shapes the distribution wants to sample from it
    penalty = _first(params.repetition_penalty, defaults.repetition_penalty)
    return {
        "temperature": temperature,
        "top_k": _first(params.top_k, defaults.top_k) or 0,
        "top_p": _first(params.top_p, defaults.top_p) or 1.0,
        "min_p": _first(params.min_p, defaults.min_p) or 0.0,
        "repetition_penalty": penalty or 1.0,
    }


def _first(given: T | None, default: T | None) -> T | None:
    return default if given is None else given
