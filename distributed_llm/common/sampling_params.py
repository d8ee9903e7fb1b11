"""Generation parameters: `SamplingParams` as users give them, `Sampling` as tasks carry them.

They are named as in `transformers.GenerationConfig` where it has them.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.types import Count, TokenId

MAX_SEED = 2**63 - 1
MAX_LOGIT_BIASES = 300
MAX_EOS = 256
MAX_STOP_TOKENS = 64
MAX_SUPPRESSED = 1024
MAX_BAD_WORDS = 256
MAX_SEQUENCE_BIASES = 64
MAX_TOKEN_CHARS = 256
"""Characters of a token that is given by how it is written, at most."""

MAX_LANGUAGE_CHARS = 32
"""Characters of the name of a language, at most."""

MAX_WORD_TOKENS = 8
"""Tokens of one bad word, or of one biased sequence, at most."""

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: the likeliest token is as good as certain."""

_MAX_STOPS = 16

_Temperature = Annotated[float, Meta(ge=0, le=100)]
_TopK = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Probability = Annotated[float, Meta(ge=0, le=1)]
_PositiveProbability = Annotated[float, Meta(gt=0, le=1)]
_Penalty = Annotated[float, Meta(ge=0.01, le=100)]
_AdditivePenalty = Annotated[float, Meta(ge=-100, le=100)]
_Bias = Annotated[float, Meta(ge=-1000, le=1000)]
_NumLogprobs = Annotated[int, Meta(ge=0, le=20)]
_Seed = Annotated[int, Meta(ge=0, le=MAX_SEED)]
_NumTokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_StopString = Annotated[str, Meta(min_length=1, max_length=256)]
_Eos = Annotated[tuple[TokenId, ...], Meta(max_length=MAX_EOS)]
_StopTokens = Annotated[tuple[TokenId, ...], Meta(max_length=MAX_STOP_TOKENS)]
_Ends = Annotated[tuple[TokenId, ...], Meta(max_length=MAX_EOS + MAX_STOP_TOKENS)]
_WrittenToken = Annotated[str, Meta(min_length=1, max_length=MAX_TOKEN_CHARS)]
_Language = Annotated[str, Meta(min_length=1, max_length=MAX_LANGUAGE_CHARS)]
_NgramSize = Annotated[int, Meta(ge=0, le=64)]
_Word = Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=MAX_WORD_TOKENS)]
_BadWords = Annotated[tuple[_Word, ...], Meta(max_length=MAX_BAD_WORDS)]
_SequenceBiases = Annotated[tuple[tuple[_Word, _Bias], ...], Meta(max_length=MAX_SEQUENCE_BIASES)]
_Suppressed = Annotated[tuple[TokenId, ...], Meta(max_length=MAX_SUPPRESSED)]
_Growth = Annotated[float, Meta(gt=0, le=100)]


class SamplingParams(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """How to generate. None stands for the value in generation_config.json, or else for off.

    Attributes:
        max_new_tokens: most tokens to generate; default: 256, or fewer if the context is full.
        fit_context: generate fewer than `max_new_tokens` where the context, or the workers' memory,
            has no room for as many; else the request fails.
        min_new_tokens: number of tokens before which no token is sampled that ends the answer.
        temperature: 0 is greedy, and so is everything below 0.00001.
        top_k: sample from the k likeliest tokens; 0 is off.
        top_p: sample from the smallest set of tokens with this total probability; 1 is off.
        min_p: drop tokens less likely than this share of the likeliest one; 0 is off.
        typical_p: sample from the tokens that tell about as much as is expected, up to this total
            probability; 1 is off.
        repetition_penalty: above 1 makes tokens of prompt and answer less likely; 1 is off.
        presence_penalty: subtracted from the logit of each token in the answer; 0 is off.
        frequency_penalty: subtracted as many times as the answer has the token; 0 is off.
        no_repeat_ngram_size: no so many tokens in a row occur twice in prompt and answer; 0 is off.
        bad_words_ids: sequences of token ids that do not occur in the answer.
        suppress_tokens: token ids that are never sampled.
        forced_bos_token_id: the first token of an encoder-decoder's answer, such as that of the
            language to translate to; its id, or how it is written ("deu_Latn"). Of other models,
            only after a prompt of a single token.
        source_language: that a text is in, by the name that the model's tokenizer has for it
            ("eng_Latn" for NLLB, "en" for M2M100, "en_XX" for mBART); default: the tokenizer's.
        target_language: to translate to, by such a name: its token is the first of the answer.
        logit_bias: by token id, a number to add to the logit.
        logprobs: number of likeliest tokens to report at each position, besides the sampled one;
            default: report no log-probabilities at all.
        n: number of answers to the prompt; they differ by their seeds.
        seed: the same seed gives the same text in float32; in bfloat16 and float16 a token may
            differ now and then, by rounding. Default: a new one for each request.
        stop_strings: the answer ends before the first occurrence of any of them.
        eos_token_id: tokens that end the answer; default: the checkpoint's.
        stop_token_ids: further tokens that end the answer, even with `ignore_eos`.
        ignore_eos: continue after an end-of-sequence token.
        skip_special_tokens: leave special tokens out of the text; if not, only those that end the
            answer are.
        timeout_s: time from the request's arrival after which it fails if it has not finished.
        trace: report with each token which machines computed it, and how long that took.
    """

    max_new_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    fit_context: bool = False
    min_new_tokens: _NumTokens | None = None
    temperature: _Temperature | None = None
    top_k: _TopK | None = None
    top_p: _PositiveProbability | None = None
    min_p: _Probability | None = None
    typical_p: _PositiveProbability | None = None
    repetition_penalty: _Penalty | None = None
    presence_penalty: _AdditivePenalty = 0.0
    frequency_penalty: _AdditivePenalty = 0.0
    no_repeat_ngram_size: _NgramSize | None = None
    bad_words_ids: _BadWords | None = None
    suppress_tokens: _Suppressed | None = None
    forced_bos_token_id: TokenId | _WrittenToken | None = None
    source_language: _Language | None = None
    target_language: _Language | None = None
    logit_bias: Annotated[dict[TokenId, _Bias], Meta(max_length=MAX_LOGIT_BIASES)] = {}
    logprobs: _NumLogprobs | None = None
    n: Annotated[int, Meta(ge=1, le=64)] = 1
    seed: _Seed | None = None
    stop_strings: Annotated[tuple[_StopString, ...], Meta(max_length=_MAX_STOPS)] = ()
    eos_token_id: _Eos | None = None
    stop_token_ids: _StopTokens = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    timeout_s: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    trace: bool = False

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "SamplingParams":
        """Return the parameters named in `arguments`; None stands for the default.

        A single string or id is taken for a list of one. Token ids of `logit_bias` may be strings,
        as in JSON.

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
        for name in ("eos_token_id", "stop_token_ids"):
            if type(values.get(name)) is int:
                values[name] = (values[name],)
        try:
            return msgspec.convert(values, cls, str_keys=True)
        except msgspec.ValidationError as exc:
            raise InvalidRequest(_complaint(arguments, str(exc))) from exc


_WANTED: Mapping[str, str] = {
    "max_new_tokens": "a whole number from 1",
    "fit_context": "true or false",
    "min_new_tokens": "a whole number from 0",
    "temperature": "a number from 0 (greedy) to 100",
    "top_k": "a whole number from 0 (off)",
    "top_p": "a number above 0, up to 1 (off)",
    "min_p": "a number from 0 (off) to 1",
    "typical_p": "a number above 0, up to 1 (off)",
    "repetition_penalty": "a number from 0.01 to 100 (1 is off)",
    "presence_penalty": "a number from -100 to 100 (0 is off)",
    "frequency_penalty": "a number from -100 to 100 (0 is off)",
    "no_repeat_ngram_size": "a whole number from 0 (off) to 64",
    "bad_words_ids": (
        f"at most {MAX_BAD_WORDS} lists of 1 to {MAX_WORD_TOKENS} token ids, one for each word"
    ),
    "suppress_tokens": f"at most {MAX_SUPPRESSED} token ids",
    "forced_bos_token_id": (
        f"a token id, or a token as it is written, of 1 to {MAX_TOKEN_CHARS} characters"
    ),
    "source_language": f"the name of a language, of 1 to {MAX_LANGUAGE_CHARS} characters",
    "target_language": f"the name of a language, of 1 to {MAX_LANGUAGE_CHARS} characters",
    "logit_bias": f"at most {MAX_LOGIT_BIASES} token ids, each with a number from -1000 to 1000",
    "logprobs": "a whole number from 0 (only the token that was picked) to 20",
    "n": "a whole number from 1 to 64",
    "seed": "a whole number from 0, below 2^63",
    "stop_strings": f"at most {_MAX_STOPS} texts of 1 to 256 characters",
    "eos_token_id": f"a token id, or a list of at most {MAX_EOS}",
    "stop_token_ids": f"a token id, or a list of at most {MAX_STOP_TOKENS}",
    "ignore_eos": "true or false",
    "skip_special_tokens": "true or false",
    "timeout_s": "a number of seconds above 0, up to 1000000",
    "trace": "true or false",
}


def _complaint(arguments: Mapping[str, Any], error: str) -> str:
    """Return a message for people: which argument is wrong, why, and what to give instead."""
    what, _, where = error.rpartition(" - at ")
    field = re.search(r"\$\.(\w+)", where)
    assert field, f"msgspec names the field: {error}"
    name = field[1]
    return (
        f"Bad generation parameter {name}={arguments[name]!r:.80}: {what[:1].lower()}{what[1:]}. "
        f"Give {_WANTED[name]}."
    )


class CheckpointParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What generation_config.json may say besides `SamplingParams`; requests cannot change it.

    Attributes:
        min_length: number of tokens, with the prompt, before which no end-of-sequence token is
            sampled; unless min_new_tokens is given.
        max_length: most tokens, with the prompt; unless max_new_tokens is given. 0 is none.
        begin_suppress_tokens: token ids that are not sampled first.
        forced_bos_token_id: the token after a prompt of a single one, or after the one that a
            decoder starts with; unless the request gives another.
        forced_eos_token_id: one of these is the last token if an answer gets as long as it may.
        encoder_repetition_penalty: above 1 makes tokens of the prompt likelier; 1 is off.
        encoder_no_repeat_ngram_size: no so many tokens in a row of the prompt occur in the answer.
        sequence_bias: sequences of token ids, each with a number to add to the logit of the last
            one where the others went before.
        exponential_decay_length_penalty: number of new tokens after which the logits of
            end-of-sequence tokens grow, and by which factor with each token.
        top_h: sample from the likeliest tokens with this share of the entropy; None is off.
        epsilon_cutoff: drop tokens that are less likely; 0 is off.
        eta_cutoff: the same, adapted to the entropy; 0 is off.
    """

    min_length: _NumTokens = 0
    max_length: _NumTokens = 0
    begin_suppress_tokens: _Suppressed = ()
    forced_bos_token_id: TokenId | None = None
    forced_eos_token_id: _Eos = ()
    encoder_repetition_penalty: _Penalty = 1.0
    encoder_no_repeat_ngram_size: _NgramSize = 0
    sequence_bias: _SequenceBiases = ()
    exponential_decay_length_penalty: tuple[_NumTokens, _Growth] | None = None
    top_h: _PositiveProbability | None = None
    epsilon_cutoff: _Probability = 0.0
    eta_cutoff: _Probability = 0.0


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How the last stage samples the tokens of one sequence: parameters after defaults.

    It is sent once, in the first slice that samples; the last stage keeps it with the sequence.
    What is not explained here is in `SamplingParams` and `CheckpointParams`.

    Attributes:
        logit_bias: pairs of a token id and a number to add to its logit.
        prompt_tokens: position at which the answer begins; presence and frequency penalties count
            from there.
        eos_token_ids: tokens that end the answer, where `eos_from` or the length penalty need them.
        eos_from: position before which these are not sampled.
        forced_eos_token_ids: one of these is sampled at `last_position`; empty is off.
        length_penalty_factor: by which the logits of `eos_token_ids` grow with each token after
            position `length_penalty_from`; None is off.
        logprobs: number of likeliest tokens to report, or None for no log-probabilities.
    """

    temperature: _Temperature = 0.0
    top_k: _TopK = 0
    top_p: _Probability = 1.0
    min_p: _Probability = 0.0
    typical_p: _PositiveProbability = 1.0
    top_h: _PositiveProbability | None = None
    epsilon_cutoff: _Probability = 0.0
    eta_cutoff: _Probability = 0.0
    repetition_penalty: _Penalty = 1.0
    encoder_repetition_penalty: _Penalty = 1.0
    presence_penalty: _AdditivePenalty = 0.0
    frequency_penalty: _AdditivePenalty = 0.0
    logit_bias: Annotated[tuple[tuple[TokenId, _Bias], ...], Meta(max_length=MAX_LOGIT_BIASES)] = ()
    sequence_bias: _SequenceBiases = ()
    no_repeat_ngram_size: _NgramSize = 0
    encoder_no_repeat_ngram_size: _NgramSize = 0
    bad_words_ids: _BadWords = ()
    suppress_tokens: _Suppressed = ()
    begin_suppress_tokens: _Suppressed = ()
    seed: _Seed = 0
    prompt_tokens: _NumTokens = 0
    eos_token_ids: _Ends = ()
    eos_from: _NumTokens = 0
    forced_bos_token_id: TokenId | None = None
    forced_eos_token_ids: _Eos = ()
    last_position: _NumTokens = 0
    length_penalty_from: Count = 0
    length_penalty_factor: _Growth | None = None
    logprobs: _NumLogprobs | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken instead of drawing one."""
        return self.temperature < GREEDY_BELOW
