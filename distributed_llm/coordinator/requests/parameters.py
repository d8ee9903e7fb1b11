"""The parameters of a request: defaults applied, limits checked. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import msgspec

from distributed_llm.common.errors import ContextLengthExceeded, InvalidRequest, NotEnoughMemory
from distributed_llm.common.grammar import Grammar
from distributed_llm.common.sampling_params import (
    MAX_SEED,
    CheckpointParams,
    Sampling,
    SamplingParams,
)
from distributed_llm.common.tensors import TensorSpec
from distributed_llm.common.types import KV_BLOCK
from distributed_llm.common.wording import count_text, too_long_text
from distributed_llm.coordinator.events import PromptKind, TextRules
from distributed_llm.coordinator.model import GenerationDefaults

DEFAULT_MAX_NEW_TOKENS = 256
"""Most tokens of an answer where neither the request nor the checkpoint sets a limit."""

_MAX_BYTES_PER_TOKEN = 64
"""Bytes of prompt per token of context above which a prompt is refused before it is tokenized."""

_MIN_PROMPT_BYTES = 64 * 1024
"""Bytes of prompt that are never refused before tokenizing, however short the context."""

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """The parameters of one request after defaults.

    Attributes:
        sampling: one for each answer, as tasks carry it.
        end_token_ids: tokens that end an answer.
    """

    sampling: tuple[Sampling, ...]
    max_new_tokens: int
    end_token_ids: tuple[int, ...]


def wrong_prompt(
    kind: PromptKind, specs: Sequence[TensorSpec], context_length: int
) -> InvalidRequest | None:
    """Return an error if the tensor of a prompt has a wrong dtype or is certainly too long."""
    wanted = "int32" if kind == "token_ids" else "uint8"
    limit = max(_MIN_PROMPT_BYTES, _MAX_BYTES_PER_TOKEN * context_length)
    for spec in specs:
        if spec.dtype != wanted:
            return InvalidRequest(f"A {kind} prompt travels as {wanted}, not {spec}.")
        if spec.nbytes > limit:
            count = spec.shape[0] if wanted == "int32" else spec.nbytes
            what = count_text(count, "token" if wanted == "int32" else "byte")
            return ContextLengthExceeded(
                f"The prompt has {what}, which no context of {context_length:,} tokens can hold. "
                "Shorten it."
            )
    return None


def wrong_languages(kind: PromptKind, params: SamplingParams) -> InvalidRequest | None:
    """Return an error if languages are given where something else says what they do."""
    if params.source_language is not None and kind != "text":
        what = "token ids" if kind == "token_ids" else "a conversation"
        return InvalidRequest(
            f"source_language says with which tokens a text begins and ends, and the prompt is "
            f"{what}. Give a text, or leave it out."
        )
    if params.target_language is not None and params.forced_bos_token_id is not None:
        return InvalidRequest(
            "target_language and forced_bos_token_id both say what an answer begins with. Give "
            "one of them."
        )
    return None


def unknown_token(
    prompt: Sequence[int], params: SamplingParams, vocab_size: int
) -> InvalidRequest | None:
    """Return an error if prompt or parameters name a token that the model does not have."""
    why = "A tokenizer may have more tokens than its model; leave out what this one stands for."
    for used, hint in ((prompt, why), (_named_tokens(params), "Give others.")):
        if used and not 0 <= min(used) <= max(used) < vocab_size:  # fast: a prompt may be long
            strange = next(token for token in used if not 0 <= token < vocab_size)
            return InvalidRequest(
                f"Token id {strange} is not in the model's vocabulary of {vocab_size}. {hint}"
            )
    return None


def _named_tokens(params: SamplingParams) -> tuple[int, ...]:
    """Return the token ids that a request's parameters name."""
    words = (token for word in params.bad_words_ids or () for token in word)
    ends = (params.eos_token_id or (), params.stop_token_ids)
    first = params.forced_bos_token_id
    others = (*ends, params.suppress_tokens or (), params.logit_bias)
    return (*words, *chain.from_iterable(others), *((first,) if isinstance(first, int) else ()))


def text_rules(
    params: SamplingParams, defaults: GenerationDefaults, grammar: Grammar | None = None
) -> TextRules:
    """Return how the text of a request's answers is made."""
    eos = _eos(params, defaults)
    hidden = None if params.skip_special_tokens else (*eos, *params.stop_token_ids)
    ends = () if grammar is None or params.ignore_eos else eos
    first = params.forced_bos_token_id
    return TextRules(
        params.stop_strings,
        hidden,
        grammar,
        ends,
        first=first if isinstance(first, str) else "",
        source=params.source_language or "",
        target=params.target_language or "",
    )


def resolve(
    params: SamplingParams,
    defaults: GenerationDefaults,
    *,
    prompt_tokens: int,
    kv_tokens: int,
    seed: int,
    constrained: bool = False,
    source_tokens: int = 0,
) -> Limits:
    """Return the parameters of a request after defaults.

    Args:
        params: the parameters that the user gave; of `forced_bos_token_id`, the id;
            of `target_language`, it stands there.
        defaults: the checkpoint's defaults.
        prompt_tokens: length of the prompt; of an encoder-decoder, tokens that its decoder starts
            with. Positions in the result count from there.
        kv_tokens: positions of KV cache that the largest pipeline has room for.
        seed: seed for a request without one.
        constrained: whether a grammar says which tokens may be sampled; none is forced then.
        source_tokens: length of what the encoder of an encoder-decoder reads.

    Raises:
        ContextLengthExceeded: prompt and answer are longer than the model's context, or the source
            is.
        NotEnoughMemory: no pipeline has room for their KV cache.
        InvalidRequest: the prompt is empty, or parameters contradict one another.
    """
    if prompt_tokens == 0 or (defaults.decoder_start and source_tokens == 0):
        raise InvalidRequest("The prompt is empty. Give at least one token.")
    if source_tokens > defaults.context_length:
        raise ContextLengthExceeded(too_long_text(source_tokens, defaults.context_length))
    if constrained and params.forced_bos_token_id is not None:
        name = "target_language" if params.target_language else "forced_bos_token_id"
        raise InvalidRequest(
            f"{name} and a grammar both say what an answer begins with. Give one of them."
        )
    kv_tokens -= kv_tokens % KV_BLOCK
    room = min(defaults.context_length, kv_tokens - source_tokens) - prompt_tokens
    usual = _usual_max_new_tokens(defaults, prompt_tokens)
    max_new_tokens = params.max_new_tokens or usual
    if params.fit_context or not params.max_new_tokens:
        max_new_tokens = max(1, min(max_new_tokens, room))
    total = prompt_tokens + max_new_tokens
    if total > defaults.context_length:
        raise ContextLengthExceeded(_too_long(defaults, prompt_tokens, max_new_tokens))
    if source_tokens + total > kv_tokens:
        raise NotEnoughMemory(
            f"Prompt and answer may take {count_text(source_tokens + total, 'token')} of context, "
            f"but the workers' memory has room for {kv_tokens:,}. Add a worker, raise "
            "--max-memory, or lower max_new_tokens."
        )
    eos = () if params.ignore_eos else _eos(params, defaults)
    ends = tuple(dict.fromkeys((*eos, *params.stop_token_ids)))
    eos_from = _eos_from(params, defaults, prompt_tokens, max_new_tokens)
    first = params.seed if params.seed is not None else seed
    sampling = Sampling(
        **_shaping(params, defaults.params),
        **_constraints(params, defaults, ends),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=tuple(params.logit_bias.items()),
        prompt_tokens=prompt_tokens,
        eos_token_ids=ends if eos_from > prompt_tokens or _decays(defaults) else (),
        eos_from=eos_from,
        **_length(defaults.checkpoint, prompt_tokens, max_new_tokens),
        logprobs=params.logprobs,
    )
    if constrained:
        sampling = msgspec.structs.replace(
            sampling, forced_bos_token_id=None, forced_eos_token_ids=()
        )
    return Limits(
        sampling=tuple(
            msgspec.structs.replace(sampling, seed=(first + choice) % (MAX_SEED + 1))
            for choice in range(params.n)
        ),
        max_new_tokens=max_new_tokens,
        end_token_ids=ends,
    )


def embedding_limits(defaults: GenerationDefaults, *, prompt_tokens: int, kv_tokens: int) -> Limits:
    """Return the parameters of a request for an embedding, which gets no tokens.

    It takes room for one token more than its prompt, as all do that run.

    Raises:
        ContextLengthExceeded: the prompt is longer than the model's context.
        NotEnoughMemory: no pipeline has room for its KV cache.
        InvalidRequest: the prompt is empty.
    """
    if prompt_tokens == 0:
        raise InvalidRequest("The prompt is empty. Give at least one token.")
    if prompt_tokens > defaults.context_length:
        raise ContextLengthExceeded(too_long_text(prompt_tokens, defaults.context_length))
    kv_tokens -= kv_tokens % KV_BLOCK
    if prompt_tokens >= kv_tokens:
        raise NotEnoughMemory(
            f"The prompt takes {count_text(prompt_tokens + 1, 'token')} of context, but the "
            f"workers' memory has room for {kv_tokens:,}. Add a worker, or raise --max-memory."
        )
    sampling = Sampling(prompt_tokens=prompt_tokens)
    return Limits(sampling=(sampling,), max_new_tokens=1, end_token_ids=())


def _too_long(defaults: GenerationDefaults, prompt_tokens: int, max_new_tokens: int) -> str:
    """Return that prompt and answer are too long, or that of an encoder-decoder the answer is."""
    shorten = "Lower" if defaults.decoder_start else "Shorten the prompt or lower"
    return (
        f"{_before_answer(defaults, prompt_tokens)} and the answer may have {max_new_tokens}: with "
        f"{prompt_tokens + max_new_tokens} tokens that exceeds the context window, as this model's "
        f"maximum context length is {defaults.context_length} tokens. {shorten} max_new_tokens."
    )


def _before_answer(defaults: GenerationDefaults, prompt_tokens: int) -> str:
    """Return how many tokens there are before the answer."""
    if defaults.decoder_start:
        return f"The decoder starts with {count_text(prompt_tokens, 'token')}"
    return f"The prompt has {prompt_tokens} tokens"


def _eos(params: SamplingParams, defaults: GenerationDefaults) -> tuple[int, ...]:
    return defaults.eos_token_ids if params.eos_token_id is None else params.eos_token_id


def _usual_max_new_tokens(defaults: GenerationDefaults, prompt_tokens: int) -> int:
    """Return the length of an answer for which the request sets none.

    Raises:
        InvalidRequest: the prompt is as long as the checkpoint lets prompt and answer be.
    """
    longest = defaults.checkpoint.max_length
    if defaults.params.max_new_tokens or not longest:
        return defaults.params.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    if prompt_tokens >= longest:
        both = "start" if defaults.decoder_start else "prompt"
        raise InvalidRequest(
            f"{_before_answer(defaults, prompt_tokens)}, and the model's settings of generation "
            f"allow {longest} for {both} and answer together (max_length). Give max_new_tokens."
        )
    return longest - prompt_tokens


def _eos_from(
    params: SamplingParams, defaults: GenerationDefaults, prompt_tokens: int, max_new_tokens: int
) -> int:
    """Return the position before which no token is sampled that ends the answer."""
    if params.min_new_tokens is not None:
        if params.min_new_tokens > max_new_tokens:
            raise InvalidRequest(
                f"min_new_tokens ({params.min_new_tokens}) is above max_new_tokens "
                f"({max_new_tokens})."
            )
        return prompt_tokens + params.min_new_tokens
    if defaults.params.min_new_tokens is not None:
        return prompt_tokens + min(defaults.params.min_new_tokens, max_new_tokens)
    return max(prompt_tokens, defaults.checkpoint.min_length)


def _decays(defaults: GenerationDefaults) -> bool:
    return defaults.checkpoint.exponential_decay_length_penalty is not None


def _constraints(
    params: SamplingParams, defaults: GenerationDefaults, end_token_ids: tuple[int, ...]
) -> dict[str, Any]:
    """Return which tokens must not, or must, be sampled."""
    usual, checkpoint = defaults.params, defaults.checkpoint
    ends = {(token,) for token in end_token_ids}
    bad_words = _first(params.bad_words_ids, usual.bad_words_ids) or ()
    return {
        "no_repeat_ngram_size": _first(params.no_repeat_ngram_size, usual.no_repeat_ngram_size)
        or 0,
        # As in transformers, a bad word cannot keep an answer from ending.
        "bad_words_ids": tuple(word for word in bad_words if word not in ends),
        "suppress_tokens": _first(params.suppress_tokens, usual.suppress_tokens) or (),
        "begin_suppress_tokens": checkpoint.begin_suppress_tokens,
        "forced_bos_token_id": _first(params.forced_bos_token_id, checkpoint.forced_bos_token_id),
        "forced_eos_token_ids": checkpoint.forced_eos_token_id,
        "encoder_repetition_penalty": checkpoint.encoder_repetition_penalty,
        "encoder_no_repeat_ngram_size": checkpoint.encoder_no_repeat_ngram_size,
        "sequence_bias": checkpoint.sequence_bias,
        "top_h": checkpoint.top_h,
        "epsilon_cutoff": checkpoint.epsilon_cutoff,
        "eta_cutoff": checkpoint.eta_cutoff,
    }


def _length(
    checkpoint: CheckpointParams, prompt_tokens: int, max_new_tokens: int
) -> dict[str, Any]:
    """Return the positions at which the end is forced, or made likelier."""
    values: dict[str, Any] = {}
    if checkpoint.forced_eos_token_id:
        values["last_position"] = prompt_tokens + max_new_tokens - 1
    if checkpoint.exponential_decay_length_penalty is not None:
        start, factor = checkpoint.exponential_decay_length_penalty
        values["length_penalty_from"] = prompt_tokens + start
        values["length_penalty_factor"] = factor
    return values


def _shaping(params: SamplingParams, defaults: SamplingParams) -> dict[str, Any]:
    temperature = params.temperature
    if temperature is None:
        temperature = defaults.temperature or 0.0
        shaped = any(x is not None for x in _warpers(params))
        if shaped and temperature == 0.0:
            temperature = 1.0  # who shapes the distribution wants to sample from it
    penalty = _first(params.repetition_penalty, defaults.repetition_penalty)
    return {
        "temperature": temperature,
        "top_k": _first(params.top_k, defaults.top_k) or 0,
        "top_p": _first(params.top_p, defaults.top_p) or 1.0,
        "min_p": _first(params.min_p, defaults.min_p) or 0.0,
        "typical_p": _first(params.typical_p, defaults.typical_p) or 1.0,
        "repetition_penalty": penalty or 1.0,
    }


def _warpers(params: SamplingParams) -> tuple[float | None, ...]:
    return params.top_k, params.top_p, params.min_p, params.typical_p


def _first(given: T | None, default: T | None) -> T | None:
    return default if given is None else given
