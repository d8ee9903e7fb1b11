"""The states of an answer, and what the book of requests does in each of them."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from distributed_llm.common import codec
from distributed_llm.common.errors import DistributedLLMError, InvalidRequest
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.messages import (
    Embed,
    Finished,
    Generate,
    RequestFailed,
    Spelling,
    TokenChunk,
    TokenLogprobs,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.states import IllegalTransition
from distributed_llm.common.tensors import frame_of_token_ids
from distributed_llm.common.types import PeerId, SequenceId
from distributed_llm.coordinator.events import (
    Action,
    Detokenize,
    Detokenized,
    Forget,
    RequestKey,
    Send,
    Tokenize,
    Tokenized,
)
from distributed_llm.coordinator.requests.answer_states import (
    ANSWER_STATES,
    AnswerCause,
    AnswerState,
)
from distributed_llm.coordinator.requests.request import Answer
from distributed_llm.coordinator.serving.event_log import EventLog
from distributed_llm.coordinator.serving.request_book import RequestBook
from distributed_llm.coordinator.serving.scheduler import Scheduler
from distributed_llm.coordinator.serving.steps import StepDone
from tests.unit.fake_model import MODEL, VOCAB

CLIENT = PeerId(b"client")
PROMPT = (1, 2, 3)
TOKEN = 5
KV_TOKENS = 1024


class Bench:
    """A book with one answer of two tokens, and a scheduler that may run it."""

    def __init__(self) -> None:
        self.book = RequestBook(MODEL.defaults, EventLog(), max_waiting=8, draw_seed=lambda: 1)
        self.book.set_capacity(KV_TOKENS)
        self.scheduler = Scheduler(
            max_sequences=4,
            max_tokens=512,
            kv_tokens=KV_TOKENS,
            new_sequence_id=map(SequenceId, itertools.count(1)).__next__,
            on_change=lambda: None,
        )
        spec, frame = frame_of_token_ids(PROMPT)
        params = SamplingParams(max_new_tokens=2, stop_strings=("stop",))
        message = Generate(request_id="r", prompt="token_ids", params=params, tensors=(spec,))
        (tokenize,) = self.book.submit(CLIENT, message, (frame,), now=0.0)
        assert isinstance(tokenize, Tokenize)
        self.key: RequestKey = tokenize.key
        assert self.book.tokenized(Tokenized(self.key, list(PROMPT))) == []
        answer = self.book.waiting.next(1 << 30, now=0.0)
        assert answer is not None
        self.answer: Answer = answer
        self.actions: list[Action] = []

    def admitted(self) -> None:
        assert self.book.admit(self.scheduler, now=1.0)

    def got_token(self) -> None:
        step = self.scheduler.next_step(max_decodes=1, prompts=True, idle=True)
        assert step is not None
        done = StepDone(step, [TOKEN], [None], (), depth=1, round_trip_s=0.1)
        self.book.step_done(done, self.scheduler.complete(step), now=2.0)

    def last_token(self) -> None:
        while self.answer.finish_reason is None:
            self.got_token()

    def preempted(self) -> None:
        """Other stages have no room for it."""
        assert not self.scheduler.resize(0)
        self.scheduler.move(0)
        self.book.collect(self.scheduler)
        self.scheduler.resize(KV_TOKENS)

    def pipeline_gone(self) -> None:
        self.book.requeue(self.scheduler.evacuate())

    def text_sent(self) -> None:
        event = Detokenized(self.key, 0, "text", num_tokens=2, stop_string=None, last=True)
        self.actions = self.book.detokenized(event, now=3.0)

    def embedded(self) -> None:
        self.answer.request.embeds = True
        step = self.scheduler.next_step(max_decodes=1, prompts=True, idle=True)
        assert step is not None
        sums = [np.ones(4, dtype=np.float32)]
        done = StepDone(step, [], [], (), depth=1, round_trip_s=0.1, sums=sums)
        self.actions = self.book.step_done(done, self.scheduler.complete(step, sums), now=2.0)

    def stop_string(self) -> None:
        event = Detokenized(self.key, 0, "text", num_tokens=1, stop_string="stop", last=False)
        self.actions = self.book.detokenized(event, now=3.0)

    def grammar_complete(self) -> None:
        event = Detokenized(self.key, 0, "text", 1, stop_string=None, last=False, complete=True)
        self.actions = self.book.detokenized(event, now=3.0)

    def failed(self) -> None:
        self.actions = self.book.fail(self.key, DistributedLLMError("It failed."))


Deed = Callable[[Bench], None]
DEEDS: dict[AnswerCause, Deed] = {
    AnswerCause.ADMITTED: Bench.admitted,
    AnswerCause.PREEMPTED: Bench.preempted,
    AnswerCause.PIPELINE_GONE: Bench.pipeline_gone,
    AnswerCause.LAST_TOKEN: Bench.last_token,
    AnswerCause.TEXT_SENT: Bench.text_sent,
    AnswerCause.EMBEDDED: Bench.embedded,
    AnswerCause.STOP_STRING: Bench.stop_string,
    AnswerCause.GRAMMAR_COMPLETE: Bench.grammar_complete,
    AnswerCause.FAILED: Bench.failed,
}
UP_TO: dict[AnswerState, tuple[Deed, ...]] = {
    # It waits with a token, so that the text of that may hold a stop string.
    AnswerState.WAITING: (Bench.admitted, Bench.got_token, Bench.pipeline_gone),
    AnswerState.RUNNING: (Bench.admitted, Bench.got_token),
    AnswerState.CLOSING: (Bench.admitted, Bench.last_token),
}


def bench_in(state: AnswerState) -> Bench:
    bench = Bench()
    for deed in UP_TO[state]:
        deed(bench)
    assert bench.answer.state is state
    bench.book.validate()
    return bench


@pytest.mark.parametrize(
    ("state", "cause"), ANSWER_STATES.transitions, ids=lambda value: value.name.lower()
)
def test_every_transition_happens(state: AnswerState, cause: AnswerCause) -> None:
    bench = bench_in(state)
    DEEDS[cause](bench)
    assert bench.answer.state is ANSWER_STATES.transitions[state, cause]
    bench.book.validate()
    bench.scheduler.validate()


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        (state, cause)
        for state in AnswerState
        for cause in AnswerCause
        if not ANSWER_STATES.allows(state, cause)
    ],
    ids=lambda value: value.name.lower(),
)
def test_any_other_raises(state: AnswerState, cause: AnswerCause) -> None:
    bench = bench_in(AnswerState.CLOSING if state is AnswerState.GONE else state)
    if state is AnswerState.GONE:
        bench.failed()
    with pytest.raises(IllegalTransition):
        bench.answer.change(cause)
    assert bench.answer.state is state


@pytest.mark.parametrize("ends", [Bench.stop_string, Bench.grammar_complete])
@pytest.mark.parametrize("state", UP_TO, ids=lambda state: state.name.lower())
def test_the_text_may_end_the_request_in_every_state(state: AnswerState, ends: Deed) -> None:
    """Also of an answer that waits: the text of its tokens comes after it lost its pipeline."""
    bench = bench_in(state)
    ends(bench)
    chunk, finished, forget = bench.actions
    assert isinstance(chunk, Send)
    assert isinstance(chunk.message, TokenChunk)
    assert (chunk.message.token_ids, chunk.message.finish_reason) == ((TOKEN,), "stop")
    assert isinstance(finished, Send)
    assert isinstance(finished.message, Finished)
    assert isinstance(forget, Forget)
    assert not bench.book.busy
    assert (bench.book.num_waiting, bench.book.num_running) == (0, 0)
    assert bench.book.waiting.next(1 << 30, now=0.0) is None


@pytest.mark.parametrize("state", UP_TO, ids=lambda state: state.name.lower())
def test_a_failure_ends_the_request_in_every_state(state: AnswerState) -> None:
    bench = bench_in(state)
    bench.failed()
    failed, forget = bench.actions
    assert isinstance(failed, Send)
    assert isinstance(failed.message, RequestFailed)
    assert isinstance(forget, Forget)
    assert not bench.book.busy
    assert bench.book.waiting.next(1 << 30, now=0.0) is None
    bench.failed()
    assert bench.actions == []


@pytest.mark.parametrize("text", ["\n" * 16_385, "👩" * 16_384], ids=["many", "wide"])
def test_a_long_piece_of_text_comes_in_messages_that_a_client_can_read(text: str) -> None:
    bench = bench_in(AnswerState.CLOSING)
    event = Detokenized(bench.key, 0, text, num_tokens=2, stop_string=None, last=True)
    *chunks, finished, _ = bench.book.detokenized(event, now=3.0)
    read = []
    for chunk in chunks:
        assert isinstance(chunk, Send)
        assert isinstance(chunk.message, TokenChunk)
        read.append(codec.to_client.decode(codec.encode(chunk.message))[0])
    assert "".join(chunk.text for chunk in read if isinstance(chunk, TokenChunk)) == text
    assert isinstance(finished, Send)
    assert isinstance(finished.message, Finished)


STRANGE = 10**6


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(eos_token_id=(3, STRANGE)),
        SamplingParams(suppress_tokens=(STRANGE,)),
        SamplingParams(bad_words_ids=((1,), (2, STRANGE))),
        SamplingParams(logit_bias={STRANGE: 1.0}),
        SamplingParams(forced_bos_token_id=STRANGE),
    ],
)
def test_a_parameter_that_names_no_token_of_the_model_is_refused(params: SamplingParams) -> None:
    bench = Bench()
    spec, frame = frame_of_token_ids(PROMPT)
    message = Generate(request_id="other", prompt="token_ids", params=params, tensors=(spec,))
    (tokenize,) = bench.book.submit(CLIENT, message, (frame,), now=0.0)
    assert isinstance(tokenize, Tokenize)
    refused, _ = bench.book.tokenized(Tokenized(tokenize.key, list(PROMPT)))
    assert isinstance(refused, Send)
    assert isinstance(refused.message, RequestFailed)
    assert refused.message.message.startswith(f"Token id {STRANGE} is not in the model's")


def test_a_token_that_is_given_as_it_is_written_gets_its_id_with_the_prompt() -> None:
    bench = Bench()
    spec, frame = frame_of_token_ids(PROMPT)
    params = SamplingParams(max_new_tokens=2, forced_bos_token_id="deu_Latn")
    message = Generate(request_id="other", prompt="token_ids", params=params, tensors=(spec,))
    (tokenize,) = bench.book.submit(CLIENT, message, (frame,), now=0.0)
    assert isinstance(tokenize, Tokenize)
    assert tokenize.rules.first == "deu_Latn"
    assert bench.book.tokenized(Tokenized(tokenize.key, [1], first=9)) == []
    bench.admitted()
    answer = bench.book.waiting.next(1 << 30, now=0.0)
    assert answer is not None
    assert answer.sampling.forced_bos_token_id == 9
    (known,) = bench.book.submit(
        CLIENT,
        Generate(
            request_id="known",
            prompt="token_ids",
            params=SamplingParams(forced_bos_token_id=9),
            tensors=(spec,),
        ),
        (frame,),
        now=0.0,
    )
    assert isinstance(known, Tokenize)
    assert known.rules.first == ""


def test_encoder_decoders_have_no_embeddings() -> None:
    defaults = replace(MODEL.defaults, decoder_start=(0,))
    book = RequestBook(defaults, EventLog(), max_waiting=8, draw_seed=lambda: 1)
    spec, frame = frame_of_token_ids(PROMPT)
    message = Embed(request_id="r", prompt="token_ids", tensors=(spec,))
    (refused,) = book.submit(CLIENT, message, (frame,), now=0.0)
    assert isinstance(refused, Send)
    assert isinstance(refused.message, RequestFailed)
    assert refused.message.code == InvalidRequest.code
    assert "encoder-decoders have no embeddings here" in refused.message.message
    assert book.num_waiting == 0


@pytest.mark.parametrize("strange", [-1, VOCAB, STRANGE, 2**31 - 1])
def test_a_prompt_with_no_token_of_the_model_is_refused(strange: int) -> None:
    """A GPU would end the process that looks it up."""
    bench = Bench()
    for prompt, refused in (([0, VOCAB - 1], False), ([1, strange, 2], True)):
        spec, frame = frame_of_token_ids(prompt)
        message = Generate(
            request_id=f"{refused}",
            prompt="token_ids",
            params=SamplingParams(max_new_tokens=4),
            tensors=(spec,),
        )
        (tokenize,) = bench.book.submit(CLIENT, message, (frame,), now=0.0)
        assert isinstance(tokenize, Tokenize)
        actions = bench.book.tokenized(Tokenized(tokenize.key, prompt))
        sent = [one.message for one in actions if isinstance(one, Send)]
        failures = [one.message for one in sent if isinstance(one, RequestFailed)]
        assert len(failures) == refused
        said = f"Token id {strange} is not in the model's vocabulary of {VOCAB}. A tokenizer may"
        assert all(failure.startswith(said) for failure in failures)


def test_log_probabilities_are_freed_when_they_are_sent() -> None:
    """Of 64 answers with 20 for each token they would take hundreds of megabytes."""
    bench = Bench()
    bench.admitted()
    chunks = []
    for count in (1, 2):
        step = bench.scheduler.next_step(max_decodes=1, prompts=True, idle=True)
        assert step is not None
        logprobs = TokenLogprobs(logprob=-float(count), top=((1, -1.0),))
        done = StepDone(step, [TOKEN], [logprobs], (), depth=1, round_trip_s=0.1)
        bench.book.step_done(done, bench.scheduler.complete(step), now=2.0)
        assert len(bench.answer.logprobs) == 1
        text = Detokenized(bench.key, 0, "x", count, stop_string=None, last=False)
        (send,) = bench.book.detokenized(text, now=2.0)
        assert isinstance(send, Send)
        assert isinstance(send.message, TokenChunk)
        chunks.append(send.message.logprobs)
        assert bench.answer.logprobs == []
    assert [[one.logprob for one in chunk] for chunk in chunks] == [[-1.0], [-2.0]]


def test_log_probabilities_are_spelled_out() -> None:
    bench = Bench()
    bench.admitted()
    step = bench.scheduler.next_step(max_decodes=1, prompts=True, idle=True)
    assert step is not None
    logprobs = TokenLogprobs(logprob=-1.0, top=((1, -1.0), (2, -2.0)))
    done = StepDone(step, [TOKEN], [logprobs], (), depth=1, round_trip_s=0.1)
    (order,) = bench.book.step_done(done, bench.scheduler.complete(step), now=2.0)
    assert isinstance(order, Detokenize)
    assert order.spell == (TOKEN, 1, 2)
    spelled = (Spelling(written=b"x"), Spelling(written=b"<s>", is_text=False), None)
    text = Detokenized(bench.key, 0, "x", 1, stop_string=None, last=False, spelled=spelled)
    (send,) = bench.book.detokenized(text, now=2.0)
    assert isinstance(send, Send)
    assert isinstance(send.message, TokenChunk)
    assert [one.spelled for one in send.message.logprobs] == [spelled]


def test_nothing_is_spelled_out_for_nobody() -> None:
    bench = Bench()
    bench.admitted()
    step = bench.scheduler.next_step(max_decodes=1, prompts=True, idle=True)
    assert step is not None
    done = StepDone(step, [TOKEN], [None], (), depth=1, round_trip_s=0.1)
    (order,) = bench.book.step_done(done, bench.scheduler.complete(step), now=2.0)
    assert isinstance(order, Detokenize)
    assert order.spell == ()


def test_log_probabilities_after_a_stop_string_are_freed_too() -> None:
    bench = Bench()
    bench.admitted()
    for _ in range(2):
        step = bench.scheduler.next_step(max_decodes=1, prompts=True, idle=True)
        assert step is not None
        done = StepDone(
            step, [TOKEN], [TokenLogprobs(logprob=-1.0, top=())], (), depth=1, round_trip_s=0.1
        )
        bench.book.step_done(done, bench.scheduler.complete(step), now=2.0)
    bench.book.detokenized(
        Detokenized(bench.key, 0, "x", 1, stop_string="stop", last=False), now=2.0
    )
    assert bench.answer.logprobs == []


@pytest.mark.parametrize("share_prefixes", [False, True])
def test_service_is_fair_among_keys_and_prefixes_are_shared_by_them(share_prefixes: bool) -> None:
    book = RequestBook(
        MODEL.defaults,
        EventLog(),
        max_waiting=99,
        draw_seed=lambda: 1,
        share_prefixes=share_prefixes,
    )
    book.set_capacity(KV_TOKENS)
    spec, frame = frame_of_token_ids(PROMPT)
    params = SamplingParams(max_new_tokens=2)
    asked = [("a1", "ann"), ("a2", "ann"), ("b1", "bob"), ("x", ""), ("y", "")]
    for peer, holder in asked:
        message = Generate(request_id="r", prompt="token_ids", params=params, tensors=(spec,))
        (tokenize,) = book.submit(
            PeerId(peer.encode()), message, (frame,), holder=PublicKey(holder), now=0.0
        )
        assert isinstance(tokenize, Tokenize)
        book.tokenized(Tokenized(tokenize.key, list(PROMPT)))
    found = {answer.request.key[0].decode(): answer.request for answer in book.waiting}
    clients = [found[peer].client for peer, _ in asked]
    assert clients == ["ann", "ann", "bob", b"x", b"y"], "without a key, a connection counts"
    shares = [found[peer].shares_with for peer, _ in asked]
    assert shares == ([None] * 5 if share_prefixes else ["ann", "ann", "bob", None, None])
    book.validate()
    for peer, _ in asked:
        book.drop_client(PeerId(peer.encode()))
    book.validate()
    assert not book.waiting.clients, "nobody's account is kept for ever"
