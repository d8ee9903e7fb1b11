"""Generation parameters: as a user gives them, as they are after defaults, as a task carries them.

Names are those of `transformers.GenerationConfig`.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.types import TokenId

MAX_SEED = 2**63 - 1
_MAX_STOPS = 16

_Temperature = Annotated[float, Meta(ge=0, le=100)]
_TopK = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Probability = Annotated[float, Meta(ge=0, le=1)]
_Penalty = Annotated[float, Meta(gt=0, le=100)]
_Seed = Annotated[int, Meta(ge=0, le=MAX_SEED)]
_NumTokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_StopString = Annotated[str, Meta(min_length=1, max_length=256)]
_Eos = Annotated[tuple[TokenId, ...], Meta(max_length=_MAX_STOPS)]


class SamplingParams(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """How to generate. None means: what the checkpoint's `generation_config.json` says, else off.

    Attributes:
        max_new_tokens: tokens to generate at most; default: 256, or what the context leaves.
        min_new_tokens: no end-of-sequence token before this many.
        temperature: 0 is greedy.
        top_k: sample from the k likeliest tokens; 0 is off.
        top_p: sample from the smallest set of tokens with this much probability; 1 is off.
        min_p: drop tokens less likely than this share of the likeliest; 0 is off.
        repetition_penalty: above 1 makes tokens of prompt and answer less likely; 1 is off.
        seed: same seed, same text; default: a new one for each request.
        stop_strings: generation ends before the first of these; they are not part of the text.
        eos_token_id: tokens that end generation; default: the checkpoint's.
        ignore_eos: go on after an end-of-sequence token.
    """

    max_new_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    min_new_tokens: _NumTokens | None = None
    temperature: _Temperature | None = None
    top_k: _TopK | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_p: _Probability | None = None
    repetition_penalty: _Penalty | None = None
    seed: _Seed | None = None
    stop_strings: Annotated[tuple[_StopString, ...], Meta(max_length=_MAX_STOPS)] = ()
    eos_token_id: _Eos | None = None
    ignore_eos: bool = False

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "SamplingParams":
        """Return the parameters named in `arguments`; one string or id may stand for a list.

        Raises:
            InvalidRequest: an unknown name, or a value of the wrong type or out of range.
        """
        values = {name: value for name, value in arguments.items() if value is not None}
        unknown = sorted(set(values) - set(cls.__struct_fields__))
        if unknown:
            known = ", ".join(cls.__struct_fields__)
            raise InvalidRequest(
                f"Unknown generation parameter {unknown[0]!r}. Known are: {known}."
            )
        if isinstance(values.get("stop_strings"), str):
            values["stop_strings"] = (values["stop_strings"],)
        if type(values.get("eos_token_id")) is int:
            values["eos_token_id"] = (values["eos_token_id"],)
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as exc:
            raise InvalidRequest(f"Bad generation parameter: {exc}.") from exc


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How the last stage picks one token: what a task carries for each sequence that samples.

    Attributes:
        suppressed: token ids that may not be sampled at this position.
    """

    temperature: _Temperature = 0.0
    top_k: _TopK = 0
    top_p: _Probability = 1.0
    min_p: _Probability = 0.0
    repetition_penalty: _Penalty = 1.0
    seed: _Seed = 0
    suppressed: _Eos = ()
