"""One request: parameters after defaults, when its answers end, and what they took."""

from typing import Any

import pytest

from distributed_llm.common.errors import (
    CheckpointError,
    ContextLengthExceeded,
    InvalidRequest,
    NotEnoughMemory,
)
from distributed_llm.common.grammar import Grammar
from distributed_llm.common.messages import (
    Generate,
    SharedPrefix,
    StageTime,
    StageTiming,
    TokenLogprobs,
    Usage,
)
from distributed_llm.common.sampling_params import MAX_SEED, Sampling, SamplingParams
from distributed_llm.common.tensors import TensorSpec
from distributed_llm.common.types import Epoch, LayerRange, PeerId, SequenceId, WorkerId
from distributed_llm.coordinator.events import PromptKind, TextRules
from distributed_llm.coordinator.model import GenerationDefaults
from distributed_llm.coordinator.plan import PipelineStage
from distributed_llm.coordinator.requests.generation_config import generation_defaults
from distributed_llm.coordinator.requests.inputs import split, wrong_inputs
from distributed_llm.coordinator.requests.parameters import (
    DEFAULT_MAX_NEW_TOKENS,
    Limits,
    resolve,
    text_rules,
    unknown_token,
    wrong_prompt,
)
from distributed_llm.coordinator.requests.request import Answer, Request


def defaults_of(
    generation_config: dict[str, Any], config: dict[str, Any] | None = None
) -> GenerationDefaults:
    return generation_defaults(config or {}, generation_config, context_length=100, vocab_size=50)


PLAIN = defaults_of({"eos_token_id": 2})


def limits_of(
    defaults: GenerationDefaults = PLAIN, *, prompt: int = 10, kv: int = 1024, **params: Any
) -> Limits:
    return resolve(
        SamplingParams.from_arguments(params),
        defaults,
        prompt_tokens=prompt,
        kv_tokens=kv,
        seed=77,
    )


def params_of(**params: Any) -> SamplingParams:
    return SamplingParams.from_arguments(params)


def request_of(limits: Limits, prompt: int = 3, **params: Any) -> Request:
    """A request that arrived at second 1; its answers are numbered from 5."""
    key = (PeerId(b"c"), "r", 0)
    request = Request(key, SamplingParams.from_arguments(params), arrived_at=1.0, client="client")
    request.accept(range(prompt), limits, number=5)
    return request


def answer_of(limits: Limits, prompt: int = 3) -> Answer:
    (answer,) = request_of(limits, prompt).answers
    return answer


def sampling_of(
    defaults: GenerationDefaults = PLAIN, *, prompt: int = 10, kv: int = 1024, **params: Any
) -> Sampling:
    """Return how the only answer is sampled."""
    (sampling,) = limits_of(defaults, prompt=prompt, kv=kv, **params).sampling
    return sampling


def sampled(*, min_new_tokens: int = 0, eos: tuple[int, ...] = (2,), **shape: Any) -> Sampling:
    """What is expected of a prompt of ten tokens without a seed, but for `shape`."""
    return Sampling(
        **{"seed": 77, "prompt_tokens": 10, **shape},
        eos_token_ids=eos if min_new_tokens else (),
        eos_from=10 + min_new_tokens,
    )


# ------------------------------------------------------------------ defaults of the checkpoint


def test_sampling_parameters_count_only_with_do_sample() -> None:
    values: dict[str, Any] = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1}
    assert defaults_of(values).params == SamplingParams(temperature=0.0)
    assert defaults_of({**values, "do_sample": False}).params == SamplingParams(temperature=0.0)
    assert defaults_of({**values, "do_sample": True}).params == SamplingParams(**values)


def test_do_sample_alone_is_temperature_one() -> None:
    assert defaults_of({"do_sample": True}).params.temperature == 1.0
    assert defaults_of({"do_sample": True, "temperature": None}).params.temperature == 1.0


def test_lengths_and_penalty_count_always() -> None:
    found = defaults_of({"max_new_tokens": 7, "min_new_tokens": 2, "repetition_penalty": 1.2})
    assert found.params == SamplingParams(
        temperature=0.0, max_new_tokens=7, min_new_tokens=2, repetition_penalty=1.2
    )


@pytest.mark.parametrize(
    ("generation_config", "config", "eos"),
    [
        ({"eos_token_id": 2}, {}, (2,)),
        ({"eos_token_id": [2, 5]}, {"eos_token_id": 9}, (2, 5)),
        ({}, {"eos_token_id": 9}, (9,)),
        ({}, {"eos_token_id": [9, 3]}, (9, 3)),
        ({"eos_token_id": 0}, {"eos_token_id": 9}, (0,)),
        ({}, {}, ()),
        ({"eos_token_id": None}, {}, ()),
        ({"eos_token_id": [-1, 49, 50]}, {}, (49,)),
    ],
)
def test_eos_tokens(generation_config: Any, config: Any, eos: tuple[int, ...]) -> None:
    assert defaults_of(generation_config, config).eos_token_ids == eos


def test_default_out_of_range_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json.*top_p=1\.5"):
        defaults_of({"do_sample": True, "top_p": 1.5})


# ------------------------------------------------------------------ lengths


def test_length_is_256_or_what_the_context_leaves() -> None:
    roomy = GenerationDefaults(10_000, 50, (), SamplingParams())
    assert limits_of(roomy, kv=10_240).max_new_tokens == DEFAULT_MAX_NEW_TOKENS == 256
    assert limits_of().max_new_tokens == 90


@pytest.mark.parametrize(("kv", "room"), [(64, 54), (127, 54), (128, 90), (65, 54)])
def test_room_in_the_kv_cache_is_whole_blocks(kv: int, room: int) -> None:
    assert limits_of(kv=kv).max_new_tokens == room
    assert limits_of(kv=kv, max_new_tokens=room).max_new_tokens == room
    if kv < 100:
        with pytest.raises(NotEnoughMemory, match=r"65 tokens of context.*room for 64"):
            limits_of(kv=kv, max_new_tokens=room + 1)


def test_length_of_the_checkpoint_is_a_wish_and_of_the_request_an_order() -> None:
    long = defaults_of({"eos_token_id": 2, "max_new_tokens": 5000, "min_new_tokens": 20})
    assert limits_of(long).max_new_tokens == 90
    assert limits_of(long, kv=64).max_new_tokens == 54
    short = limits_of(long, max_new_tokens=5)
    assert (short.max_new_tokens, short.sampling[0].eos_from) == (5, 15)
    with pytest.raises(ContextLengthExceeded):
        limits_of(long, max_new_tokens=91)
    assert limits_of(defaults_of({"max_new_tokens": 8})).max_new_tokens == 8


def test_length_that_may_be_less_is_what_there_is_room_for() -> None:
    assert limits_of(max_new_tokens=5000, fit_context=True).max_new_tokens == 90
    assert limits_of(max_new_tokens=5000, fit_context=True, kv=64).max_new_tokens == 54
    assert limits_of(max_new_tokens=5, fit_context=True).max_new_tokens == 5


def test_context_exceeded_names_both_numbers() -> None:
    assert limits_of(max_new_tokens=90).max_new_tokens == 90
    with pytest.raises(ContextLengthExceeded) as caught:
        limits_of(max_new_tokens=91)
    message = str(caught.value)
    assert "prompt has 10 tokens" in message
    assert "answer may have 91" in message
    assert "with 101 tokens that exceeds the context window" in message


def test_prompt_that_leaves_no_room() -> None:
    assert limits_of(prompt=99).max_new_tokens == 1
    with pytest.raises(ContextLengthExceeded, match=r"101 tokens that exceeds"):
        limits_of(prompt=100)


def test_prompt_that_the_kv_cache_has_no_room_for() -> None:
    assert limits_of(prompt=63, kv=64).max_new_tokens == 1
    with pytest.raises(NotEnoughMemory, match=r"65 tokens of context.*room for 64"):
        limits_of(prompt=64, kv=64)
    with pytest.raises(NotEnoughMemory, match=r"11 tokens of context.*room for 0"):
        limits_of(kv=63)


def test_empty_prompt() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        limits_of(prompt=0)


def test_min_above_max() -> None:
    assert sampling_of(min_new_tokens=5, max_new_tokens=5).eos_from == 15
    with pytest.raises(InvalidRequest, match=r"min_new_tokens \(6\) is above max_new_tokens \(5\)"):
        limits_of(min_new_tokens=6, max_new_tokens=5)


# ------------------------------------------------------------------ sampling


def test_greedy_unless_someone_samples() -> None:
    assert sampling_of() == sampled()
    assert sampling_of(temperature=0.0, top_k=5, top_p=0.5).temperature == 0.0
    warm = defaults_of({"do_sample": True, "temperature": 0.6, "top_k": 20})
    assert sampling_of(warm) == sampled(temperature=0.6, top_k=20)
    assert sampling_of(warm, temperature=0.0).temperature == 0.0


@pytest.mark.parametrize("shape", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_shaping_the_distribution_means_sampling_from_it(shape: dict[str, Any]) -> None:
    assert sampling_of(**shape).temperature == 1.0
    warm = defaults_of({"do_sample": True, "temperature": 0.6})
    assert sampling_of(warm, **shape).temperature == 0.6


def test_request_overrides_each_default() -> None:
    values: dict[str, Any] = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1}
    warm = defaults_of({"do_sample": True, "repetition_penalty": 1.3, **values})
    off: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    assert sampling_of(warm, **off) == sampled(temperature=0.5)
    assert sampling_of(warm) == sampled(**values, repetition_penalty=1.3)


def test_what_only_a_request_gives() -> None:
    given = sampling_of(
        presence_penalty=0.5, frequency_penalty=-1.0, logit_bias={7: -2.0, 3: 1.5}, logprobs=4
    )
    assert given == sampled(
        presence_penalty=0.5, frequency_penalty=-1.0, logit_bias=((7, -2.0), (3, 1.5)), logprobs=4
    )
    assert sampling_of(logprobs=0).logprobs == 0


@pytest.mark.parametrize(
    ("given", "seeds"),
    [
        (None, (77, 78, 79)),
        (0, (0, 1, 2)),
        (MAX_SEED - 1, (MAX_SEED - 1, MAX_SEED, 0)),
    ],
)
def test_answers_differ_by_their_seeds(given: int | None, seeds: tuple[int, ...]) -> None:
    limits = limits_of(n=3, seed=given, temperature=0.5, logprobs=1)
    assert limits.sampling == tuple(sampled(temperature=0.5, logprobs=1, seed=s) for s in seeds)


def test_eos_is_suppressed_until_min_new_tokens() -> None:
    assert sampling_of(min_new_tokens=2) == sampled(min_new_tokens=2)
    assert sampling_of(min_new_tokens=2, eos_token_id=[7, 8]).eos_token_ids == (7, 8)
    wish = defaults_of({"eos_token_id": 2, "min_new_tokens": 4})
    assert sampling_of(wish) == sampled(min_new_tokens=4)
    assert sampling_of(wish, min_new_tokens=0) == sampled()
    assert sampling_of(wish, ignore_eos=True).eos_token_ids == ()


# ------------------------------------------------------------------ the end of an answer


def test_ends_with_eos() -> None:
    answer = answer_of(limits_of(max_new_tokens=5))
    answer.append(9, None, now=2.0)
    assert answer.finish_reason is None
    answer.append(2, None, now=3.0)
    assert answer.finish_reason == "stop"
    assert answer.token_ids == [0, 1, 2, 9, 2]


def test_ends_at_its_length() -> None:
    answer = answer_of(limits_of(max_new_tokens=2))
    answer.append(9, None, now=2.0)
    assert answer.finish_reason is None
    answer.append(9, None, now=2.0)
    assert answer.finish_reason == "length"
    assert answer.request.reserved_tokens == 5


def test_last_token_that_is_eos_counts_as_stop() -> None:
    answer = answer_of(limits_of(max_new_tokens=1))
    answer.append(2, None, now=2.0)
    assert answer.finish_reason == "stop"


def test_eos_of_the_request_replaces_the_checkpoints() -> None:
    assert limits_of(eos_token_id=[7, 8]).end_token_ids == (7, 8)
    assert limits_of(eos_token_id=[]).end_token_ids == ()


def test_stop_tokens_end_the_answer_besides_eos_and_even_without() -> None:
    assert limits_of(stop_token_ids=[7, 2]).end_token_ids == (2, 7)
    assert limits_of(stop_token_ids=7, ignore_eos=True).end_token_ids == (7,)
    assert sampling_of(min_new_tokens=2, stop_token_ids=[7]).eos_token_ids == (2, 7)
    assert unknown_token((), params_of(stop_token_ids=[7]), 8) is None
    error = unknown_token((), params_of(stop_token_ids=[7]), 7)
    assert str(error) == "Token id 7 is not in the model's vocabulary of 7. Give others."
    answer = answer_of(limits_of(stop_token_ids=[7]))
    answer.append(7, None, now=1.0)
    assert answer.finish_reason == "stop"


def test_shown_are_all_special_tokens_but_those_that_end_the_answer() -> None:
    assert text_rules(params_of(stop_strings="x"), PLAIN) == TextRules(("x",))
    shown = params_of(skip_special_tokens=False, stop_token_ids=[7], ignore_eos=True)
    assert text_rules(shown, PLAIN) == TextRules(hidden=(2, 7))


SPEC, TEXT = TensorSpec("int32", (2,)), TensorSpec("uint8", (2,))


def generate(grammar: Any, *specs: TensorSpec) -> Generate:
    return Generate(
        request_id="r", prompt="token_ids", params=SamplingParams(), tensors=specs, grammar=grammar
    )


def test_prompt_and_grammar_are_told_apart() -> None:
    assert split(generate(None, SPEC), (b"prompt",)) == (b"prompt", None)
    assert split(generate("json_object"), ()) == (b"", Grammar("json_object"))
    assert split(generate("json_object", SPEC), (b"prompt",)) == (b"prompt", Grammar("json_object"))
    regex = Grammar("regex", "é")
    assert split(generate("regex", SPEC, TEXT), (b"prompt", "é".encode())) == (b"prompt", regex)
    assert split(generate("regex", TEXT), ("é".encode(),)) == (b"", regex)
    for frames in ((), (b"prompt", b"\xff"), (b"prompt", b"")):
        with pytest.raises(InvalidRequest, match="grammar"):
            split(generate("regex"), frames)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (generate(None, SPEC, TEXT), "2 tensors, not 1"),
        (generate("regex", SPEC, SPEC), "int32"),
        (generate("regex", SPEC, TensorSpec("uint8", (2**20 + 1,))), "at most 1,048,576"),
        (generate("regex", TEXT, TEXT), "prompt travels as int32"),
    ],
)
def test_other_tensors_than_prompt_and_grammar_are_refused(message: Generate, why: str) -> None:
    wrong = wrong_inputs(message, 100)
    assert wrong is not None
    assert why in str(wrong)


def test_languages_that_something_else_says_are_refused() -> None:
    def why(prompt: PromptKind, **given: object) -> str:
        params = params_of(**given)
        message = Generate(request_id="r", prompt=prompt, params=params, tensors=())
        return str(wrong_inputs(message, 100) or "")

    assert why("text", source_language="de", target_language="fr") == ""
    assert why("token_ids", target_language="fr") == ""
    assert "the prompt is token ids" in why("token_ids", source_language="de")
    assert "the prompt is a conversation" in why("chat", source_language="de")
    both = why("text", target_language="fr", forced_bos_token_id=3)
    assert both.startswith("target_language and forced_bos_token_id both")
    said = params_of(target_language="fr", forced_bos_token_id=3)  # the tokenizer put it there
    with pytest.raises(InvalidRequest, match="target_language and a grammar both say"):
        resolve(said, PLAIN, prompt_tokens=1, kv_tokens=1024, seed=1, constrained=True)


def test_what_ends_an_answer_may_come_where_its_grammar_is_complete() -> None:
    grammar = Grammar("regex", "a")
    usual = text_rules(params_of(stop_token_ids=[7]), PLAIN, grammar)
    assert (usual.grammar, usual.ends) == (grammar, (2,))
    assert text_rules(params_of(ignore_eos=True), PLAIN, grammar).ends == ()


def test_no_token_is_forced_on_a_grammar() -> None:
    forcing = defaults_of({"forced_eos_token_id": 3, "forced_bos_token_id": 4})
    free, bound = (
        resolve(
            params_of(), forcing, prompt_tokens=1, kv_tokens=1024, seed=1, constrained=constrained
        ).sampling[0]
        for constrained in (False, True)
    )
    assert (free.forced_bos_token_id, free.forced_eos_token_ids) == (4, (3,))
    assert (bound.forced_bos_token_id, bound.forced_eos_token_ids) == (None, ())


def test_eos_in_the_prompt_ends_nothing() -> None:
    answer = answer_of(limits_of(max_new_tokens=3))
    assert 2 in answer.token_ids
    answer.append(0, None, now=2.0)
    assert answer.finish_reason is None


def test_ignore_eos_goes_on() -> None:
    answer = answer_of(limits_of(ignore_eos=True, max_new_tokens=3))
    answer.append(2, None, now=2.0)
    assert answer.finish_reason is None


def test_log_probabilities_are_kept_if_there_are_any() -> None:
    answer = answer_of(limits_of(max_new_tokens=3, logprobs=0))
    said = [TokenLogprobs(logprob=-1.0), TokenLogprobs(logprob=-2.0)]
    answer.append(9, said[0], now=2.0)
    answer.append(9, said[1], now=2.0)
    assert answer.logprobs == said
    silent = answer_of(limits_of(max_new_tokens=3))
    silent.append(9, None, now=2.0)
    assert silent.logprobs == []


# ------------------------------------------------------------------ several answers


def test_each_answer_has_its_own_tokens_and_number() -> None:
    limits = limits_of(n=3, max_new_tokens=4)
    answers = request_of(limits).answers
    assert [(answer.number, answer.choice) for answer in answers] == [(5, 0), (6, 1), (7, 2)]
    assert tuple(answer.sampling for answer in answers) == limits.sampling
    answers[1].append(9, None, now=2.0)
    assert [answer.num_new_tokens for answer in answers] == [0, 1, 0]
    assert [answer.num_unscheduled_tokens for answer in answers] == [3, 4, 3]


def test_usage_counts_the_prompt_once_and_all_answers() -> None:
    request = request_of(limits_of(n=2, max_new_tokens=4))
    first, second = request.answers
    first.num_cached_tokens, second.num_cached_tokens = 1, 3
    for answer, tokens in ((first, 2), (second, 3)):
        for _ in range(tokens):
            answer.append(9, None, now=2.0)
    assert request.usage() == Usage(prompt_tokens=3, completion_tokens=5, cached_tokens=1)


def test_reset_keeps_the_answer() -> None:
    answer = answer_of(limits_of(max_new_tokens=4))
    answer.sequence_id, answer.sampling_sent, answer.num_in_flight = SequenceId(1), True, 1
    answer.num_computed_tokens, answer.num_scheduled_tokens = 2, 3
    answer.prefix = SharedPrefix(sequence_id=SequenceId(0), length=1)
    answer.append(9, None, now=2.0)
    answer.reset()
    assert answer.token_ids == [0, 1, 2, 9]
    fresh = answer_of(limits_of())
    for name in ("sequence_id", "prefix", "sampling_sent", "num_computed_tokens", "num_in_flight"):
        assert getattr(answer, name) == getattr(fresh, name)
    assert answer.num_unscheduled_tokens == 4


def test_sampling_takes_room_in_a_message_until_it_is_known() -> None:
    answer = answer_of(limits_of(logit_bias={1: 1.0, 2: 1.0}))
    plain = answer_of(limits_of())
    assert answer.sampling_bytes > plain.sampling_bytes > 0
    answer.sampling_sent = True
    assert answer.sampling_bytes == 0


def test_deadline() -> None:
    assert request_of(limits_of()).deadline is None
    assert request_of(limits_of(), timeout_s=2.5).deadline == 3.5


# ------------------------------------------------------------------ timings


def stages(*workers: tuple[str, int, int]) -> tuple[PipelineStage, ...]:
    return tuple(
        PipelineStage(PeerId(name.encode()), WorkerId(name), LayerRange(start, stop))
        for name, start, stop in workers
    )


def times(*compute_us: int) -> tuple[StageTime, ...]:
    return tuple(StageTime(compute_us=us, layers_us=0, queued_us=1_000_000) for us in compute_us)


def test_timings_of_one_answer() -> None:
    answer = answer_of(limits_of(max_new_tokens=3))
    answer.started_at = 2.5
    for now in (4.0, 5.0, 7.0):
        answer.append(9, None, now=now)
    plan = stages(("a", 0, 1), ("b", 1, 2))
    answer.stage_times.add(Epoch(1), plan, times(100_000, 250_000))
    answer.stage_times.add(Epoch(1), plan, times(200_000, 500_000))
    timings = answer.request.timings()
    assert (timings.queued_s, timings.first_token_s, timings.decode_s) == (1.5, 1.5, 3.0)
    assert timings.stages == (
        StageTiming(worker="a", layers=LayerRange(0, 1), tasks=2, compute_s=0.3),
        StageTiming(worker="b", layers=LayerRange(1, 2), tasks=2, compute_s=0.75),
    )


def test_timings_of_several_answers_and_plans() -> None:
    request = request_of(limits_of(n=2, max_new_tokens=9))
    first, second = request.answers
    first.started_at, second.started_at = 3.0, 2.0
    for answer, instants in ((first, (6.0, 8.0)), (second, (5.0, 9.0, 9.5))):
        for now in instants:
            answer.append(9, None, now=now)
    old = stages(("b", 0, 1), ("a", 1, 2))
    new = stages(("b", 0, 1), ("c", 1, 2))
    first.stage_times.add(Epoch(1), old, times(1_000_000, 2_000_000))
    first.stage_times.add(Epoch(2), new, times(1_000_000, 4_000_000))
    second.stage_times.add(Epoch(2), new, times(1_500_000, 8_000_000))
    timings = request.timings()
    assert (timings.queued_s, timings.first_token_s, timings.decode_s) == (1.0, 3.0, 4.5)
    assert timings.stages[0] == StageTiming(
        worker="b", layers=LayerRange(0, 1), tasks=3, compute_s=3.5
    )
    assert {(s.worker, s.tasks, s.compute_s) for s in timings.stages[1:]} == {
        ("a", 1, 2.0),
        ("c", 2, 12.0),
    }


# ------------------------------------------------------------------ prompts that cannot be right


def complaint(prompt: Any, dtype: Any, size: int, context: int = 100) -> InvalidRequest | None:
    """Return what is wrong with a prompt tensor of this dtype and size."""
    spec = TensorSpec(dtype, (size,))
    message = Generate(request_id="r", prompt=prompt, params=SamplingParams(), tensors=(spec,))
    return wrong_prompt(message.prompt, message.tensors, context)


@pytest.mark.parametrize(
    ("prompt", "right", "wrong"),
    [("text", "uint8", "int32"), ("chat", "uint8", "int32"), ("token_ids", "int32", "uint8")],
)
def test_dtype_of_a_prompt(prompt: str, right: str, wrong: str) -> None:
    assert complaint(prompt, right, 16) is None
    error = complaint(prompt, wrong, 16)
    assert error is not None
    assert f"travels as {right}" in str(error)


def test_prompt_that_no_context_can_hold() -> None:
    assert complaint("text", "uint8", 64 * 1024) is None
    assert isinstance(complaint("text", "uint8", 64 * 1024 + 1), ContextLengthExceeded)
    assert complaint("text", "uint8", 128_000, context=2000) is None
    assert isinstance(complaint("text", "uint8", 128_001, context=2000), ContextLengthExceeded)
    too_many = complaint("token_ids", "int32", 16 * 1024 + 1)
    assert isinstance(too_many, ContextLengthExceeded)
    assert str(too_many).startswith("The prompt has 16,385 tokens, which no context of 100 tokens")


def test_empty_text() -> None:
    message = Generate(request_id="r", prompt="text", params=SamplingParams(), tensors=())
    assert wrong_prompt(message.prompt, message.tensors, 100) is None
