"""What Ollama's requests say of how to generate, as the cluster takes it. Pure."""

from collections.abc import Mapping
from typing import Any

import msgspec

from distributed_llm.api.chat.parsing.formats import Formats
from distributed_llm.api.errors import ApiError, invalid, unsupported
from distributed_llm.api.ollama.bodies import GeneratingBody
from distributed_llm.api.openai.sampling import arguments
from distributed_llm.common.grammar import Grammar

NAMES: Mapping[str, str] = {
    **{
        name: name
        for name in (
            *("temperature", "top_k", "top_p", "min_p", "typical_p", "seed"),
            *("presence_penalty", "frequency_penalty"),
        )
    },
    "repeat_penalty": "repetition_penalty",
    "num_predict": "max_new_tokens",
    "stop": "stop_strings",
    "top_logprobs": "logprobs",
}
"""Names of `SamplingParams` by the names of Ollama's options."""

_UNLIMITED = 2**31 - 1

_OFF: Mapping[str, tuple[Any, ...]] = {
    "mirostat": (0,),
    "tfs_z": (1, 1.0),
    "penalize_newline": (True,),
}
"""Options that are known and not done, and the values that are done anyway, besides null."""

_OF_THE_ENGINE = frozenset(
    {
        *("numa", "num_ctx", "num_batch", "num_gpu", "main_gpu", "low_vram", "f16_kv"),
        *("logits_all", "vocab_only", "use_mmap", "use_mlock", "embedding_only", "num_thread"),
        *("num_keep", "repeat_last_n", "mirostat_tau", "mirostat_eta"),
    }
)
"""Options that say how Ollama's own engine is to work; workers see to that themselves."""


def params_of(body: GeneratingBody) -> dict[str, Any]:
    """Return the arguments of `SamplingParams` that a body asks for.

    Raises:
        ApiError: an option is wrong, or cannot be done.
    """
    given = dict(body.options or {})
    for name, values in _OFF.items():
        if given.get(name) is not None and given[name] not in values:
            raise unsupported(name, f"The option {name} cannot be done here. Leave it out.")
    for name in ("num_predict", "seed"):
        value = given.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value < 0:
            given[name] = None  # which is Ollama's way to say "no limit" and "any"
    if body.logprobs:
        given["top_logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        raise invalid("top_logprobs goes with logprobs: true.", "top_logprobs")
    params = arguments(given, NAMES)
    params.setdefault("max_new_tokens", _UNLIMITED)
    params["fit_context"] = True
    if body.format:
        params["grammar"] = _grammar(body.format)
    return params


def unknown_options(body: GeneratingBody) -> list[str]:
    """Return the names of options that nobody knows."""
    known = {*NAMES, *_OFF, *_OF_THE_ENGINE}
    return [name for name in body.options or () if name not in known]


def _grammar(wanted: str | dict[str, Any]) -> Grammar:
    if isinstance(wanted, str):
        return Grammar("json_object")
    return Grammar("json_schema", msgspec.json.encode(wanted).decode())


def thinking(body: GeneratingBody, formats: Formats, template: str, name: str) -> dict[str, Any]:
    """Return the arguments by which a chat template is told whether to think.

    Args:
        formats: how the model writes.
        template: its chat template.
        name: of the model, for people.

    Raises:
        ApiError: it cannot think.
    """
    if body.think is None:
        return {}
    if formats.thinking_switch:
        return {formats.thinking_switch: body.think is not False}
    if isinstance(body.think, str) and "reasoning_effort" in template:
        return {"reasoning_effort": body.think}
    if body.think and formats.reasoning is None:
        raise _cannot_think(name)
    return {}


def _cannot_think(name: str) -> ApiError:
    return invalid(f"{name!r:.100} does not support thinking. Leave think out.", "think")
