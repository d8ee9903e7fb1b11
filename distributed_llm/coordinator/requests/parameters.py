"""The parameters of a request: defaults applied, limits checked. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from distributed_llm.common.errors import ContextLengthExceeded, InvalidRequest, NotEnoughMemory
from distributed_llm.common.messages import Generate
from distributed_llm.common.sampling_params import MAX_SEED, Sampling, SamplingParams
from distributed_llm.common.types import KV_BLOCK
from distributed_llm.common.wording import count_text
from distributed_llm.coordinator.model import GenerationDefaults

DEFAULT_MAX_NEW_TOKENS = 256
"""Most tokens of an answer where neither the request nor the checkpoint sets a limit."""

_MAX_BYTES_PER_TOKEN = 64
"""Bytes of prompt per token of context above which a prompt is refused before it is tokenized."""

_MIN_PROMPT_BYTES = 64 * 1024
"""Bytes of prompt that are never refused before tokenizing, however short the context."""

T = TypeVar("T")


def generation_defaults(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    *,
    context_length: int,
    vocab_size: int,
) -> GenerationDefaults:
    """Return the generation defaults of a checkpoint.

    As in transformers, sampling parameters apply only if `do_sample` is true. End-of-sequence ids
    outside the vocabulary (some files have -1) are ignored.

    Args:
        config: content of config.json.
        generation_config: content of generation_config.json.

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
        sampling: one for each answer, as tasks carry it.
        eos_token_ids: tokens that end an answer; empty if they are ignored.
    """

    sampling: tuple[Sampling, ...]
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]


def wrong_prompt(message: Generate, context_length: int) -> InvalidRequest | None:
    """Return an error if the prompt of `message` has a wrong dtype or is certainly too long."""
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
    """Return the parameters of a request after defaults.

    Args:
        params: the parameters that the user gave.
        defaults: the checkpoint's defaults.
        prompt_tokens: length of the prompt.
        kv_tokens: positions of KV cache that the largest pipeline has room for.
        seed: seed for a request without one.

    Raises:
        ContextLengthExceeded: prompt and answer are longer than the model's context.
        NotEnoughMemory: no pipeline has room for their KV cache.
        InvalidRequest: the prompt is empty, or parameters contradict one another.
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
            f"Prompt and answer may take {count_text(total, 'token')} of context, but the workers' "
            f"memory has room for {kv_tokens:,}. Add a worker, raise --max-memory, or lower "
            "max_new_tokens."
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
