"""The fake clients of a simulation, which check what they are sent, and its fake text process."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from distributed_llm.common import codec
from distributed_llm.common.errors import RemoteProtocolError
from distributed_llm.common.messages import (
    Cancel,
    ClientHello,
    ClientWelcome,
    Embed,
    Embedded,
    Finished,
    FinishReason,
    FromClient,
    Generate,
    Ping,
    Pong,
    Refused,
    RequestFailed,
    StatusReport,
    StepTrace,
    ToClient,
    TokenChunk,
    TokenLogprobs,
    Usage,
    WorkerDrained,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.tensors import (
    Frame,
    floats_of_frame,
    frame_of_bytes,
    frame_of_token_ids,
)
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.coordinator import events
from distributed_llm.coordinator.events import RequestKey
from tests.unit.fake_model import (
    CONTEXT,
    DECODER_START,
    EOS,
    admitted,
    mask_of,
    reference,
    reference_embedding,
    reference_logprobs,
)

if TYPE_CHECKING:
    from tests.unit.simulation import Link, World


@dataclass
class Answer:
    """What a client got for a request; further choices are answers of their own.

    Attributes:
        sent_at: when the request was sent, clock seconds; likewise the others.
        token_times: when each token came.
        grammar: made-up, for `fake_model.admitted`; empty for none.
        forms: of the weights of all plans that were announced, oldest first.
        first_form: which of them was the newest when the request was sent.
        encoder_layers: of the model, if it is an encoder-decoder.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    sent_at: float = 0.0
    choice: int = 0
    others: list["Answer"] = field(default_factory=list)
    reason: FinishReason | None = None
    stop_string: str | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    trace: list[StepTrace] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    text: str = ""
    end: Finished | Embedded | RequestFailed | None = None
    embeds: bool = False
    embedding: list[float] | None = None
    ended_at: float = 0.0
    cancelled: bool = False
    grammar: str = ""
    forms: Sequence[Quantize] = ("none",)
    first_form: int = 0
    encoder_layers: int = 0
    _expected: list[int] | None = None

    @property
    def code(self) -> str:
        """Why it failed; empty if it did not."""
        return self.end.code if isinstance(self.end, RequestFailed) else ""

    @property
    def message(self) -> str:
        """What it was told when it failed; empty if it did not."""
        return self.end.message if isinstance(self.end, RequestFailed) else ""

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it finished."""
        return self.reason if isinstance(self.end, Finished) else None

    @property
    def all(self) -> list["Answer"]:
        """All choices, this one first."""
        return [self, *self.others]

    def expected(self) -> list[int]:
        """Return the answer without faults."""
        if self._expected is None:
            self._expected = self._reference()
        return self._expected

    def _reference(self) -> list[int]:
        room = CONTEXT - (len(DECODER_START) if self.encoder_layers else len(self.prompt))
        tokens = reference(
            self.prompt,
            self.params,
            choice=self.choice,
            default_max_new_tokens=room,
            grammar=self.grammar,
            forms=self._forms_of_tokens(),
            encoder_layers=self.encoder_layers,
        )
        for count in range(1, len(tokens) + 1):
            if any(stop in text_of(tokens[:count]) for stop in self.params.stop_strings):
                return tokens[:count]
        return tokens

    def _forms_of_tokens(self) -> list[Quantize]:
        """Return which weights each token shows; the last ones, if any, are those of the rest.

        These must be weights that were announced, in that order.
        """
        announced = self.forms[self.first_form :]
        if len(announced) == 1:
            return [announced[0]]
        forms: list[Quantize] = []
        for form in announced:
            tokens, logprobs = self._told([*forms, form])
            while (at := len(forms)) < min(len(self.token_ids), len(tokens)):
                same = self.logprobs[at : at + 1] == logprobs[at : at + 1]
                if self.token_ids[at] != tokens[at] or not same:
                    break
                forms.append(form)
        assert len(forms) == len(self.token_ids), f"token {len(forms)} is of unknown weights"
        return forms or [announced[-1]]

    def _told(self, forms: Sequence[Quantize]) -> tuple[list[int], list[TokenLogprobs]]:
        """Return what comes after the tokens that came; `forms` are of these and of the rest."""
        given: dict[str, Any] = {
            "choice": self.choice,
            "grammar": self.grammar,
            "forms": forms,
            "encoder_layers": self.encoder_layers,
        }
        limit = self.params.max_new_tokens or len(self.token_ids)
        params = msgspec.structs.replace(self.params, max_new_tokens=max(1, limit))
        tokens = reference(self.prompt, params, **given)
        if params.logprobs is None:
            return tokens, []
        return tokens, reference_logprobs(self.prompt, params, **given)

    def check(self) -> None:
        """Assert that all that came is right."""
        self._expected = None
        for other in self.others:
            other.check()
        if self.embeds:
            self._check_embedding()
            return
        expected = self.expected()
        assert self.token_ids == expected[: len(self.token_ids)]
        if self.params.logprobs is not None:
            known = reference_logprobs(
                self.prompt,
                self.params,
                choice=self.choice,
                grammar=self.grammar,
                forms=self._forms_of_tokens(),
                encoder_layers=self.encoder_layers,
            )
            assert self.logprobs == known[: len(self.token_ids)]
        sampled = [step.index for step in self.trace if step.sampled]
        assert sampled == (list(range(len(self.token_ids))) if self.params.trace else [])
        if isinstance(self.end, Finished):
            assert self.token_ids == expected
            assert self.end.usage.prompt_tokens == len(self.prompt)
            assert self.reason is not None
            if self.choice == 0:
                lengths = [len(one.expected()) for one in self.all]
                assert self.end.usage.completion_tokens == sum(lengths)
            whole = text_of(expected)
            found = [(at, s) for s in self.params.stop_strings if (at := whole.find(s)) >= 0]
            end, stop = min(found, default=(None, None))
            assert self.text == whole[:end]
            assert self.stop_string == stop
            if not admitted(self.grammar, expected):
                assert self.reason == "stop"

    def _check_embedding(self) -> None:
        assert not self.token_ids
        assert not isinstance(self.end, Finished)
        if isinstance(self.end, Embedded):
            known = {*self.forms[self.first_form :]}
            assert self.embedding in [reference_embedding(self.prompt, form) for form in known]
            assert self.end.usage == Usage(prompt_tokens=len(self.prompt), completion_tokens=0)


class SimClient:
    """A client that checks the order of what it is sent."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.gone = False
        self.answers: dict[str, Answer] = {}
        self.others: list[ToClient] = []
        self.link = world.connect(self, "client")
        self.say(ClientHello())
        self._ping()

    def say(self, message: FromClient, frames: Sequence[Frame] = ()) -> None:
        """Send a message."""
        if not self.gone:
            self.world.send_up(self.link, message, frames)

    def submit(
        self,
        prompt: Sequence[int] = (1, 2, 3),
        params: SamplingParams | None = None,
        *,
        request_id: str = "",
        grammar: str = "",
    ) -> Answer:
        """Send a request for 8 tokens, or with `params`."""
        name = request_id or f"r{len(self.answers)}"
        params = params or SamplingParams(max_new_tokens=8)
        answer, *others = (
            Answer(tuple(prompt), params, self.world.now, choice, grammar=grammar, **self._forms())
            for choice in range(params.n)
        )
        answer.others = others
        self.answers[name] = answer
        tensors = [frame_of_token_ids(prompt)]
        if grammar:
            tensors.append(frame_of_bytes(grammar.encode()))
        message = Generate(
            request_id=name,
            prompt="token_ids",
            params=answer.params,
            tensors=tuple(spec for spec, _ in tensors),
            grammar="lark" if grammar else None,
        )
        self.say(message, tuple(frame for _, frame in tensors))
        return answer

    def embed(self, prompt: Sequence[int], timeout_s: float | None = None) -> Answer:
        """Ask for an embedding."""
        name = f"r{len(self.answers)}"
        params = SamplingParams(max_new_tokens=1, timeout_s=timeout_s)
        answer = Answer(tuple(prompt), params, self.world.now, embeds=True, **self._forms())
        self.answers[name] = answer
        spec, frame = frame_of_token_ids(prompt)
        message = Embed(request_id=name, prompt="token_ids", timeout_s=timeout_s, tensors=(spec,))
        self.say(message, (frame,))
        return answer

    def _forms(self) -> dict[str, Any]:
        forms = self.world.checker.forms
        encoders = self.world.model.cost.encoder_layers
        return {"forms": forms, "first_form": len(forms) - 1, "encoder_layers": encoders}

    def cancel(self, request_id: str) -> None:
        """Cancel a request."""
        self.answers[request_id].cancelled = True
        self.say(Cancel(request_id=request_id))

    def vanish(self, *, silently: bool = False) -> None:
        """End without a word; silently if nobody closes the connection."""
        self.gone = True
        if not silently:
            self.world.close(self.link)

    def receive(self, link: "Link", wire: list[Frame]) -> None:
        """Take a message; end the session if it cannot be read, as none of these is an answer."""
        if self.gone:
            return
        try:
            message, tensors = codec.to_client.decode(wire)
        except RemoteProtocolError:
            self.vanish()
            return
        match message:
            case TokenChunk(request_id=name, index=index, text=text, token_ids=ids):
                answer = self.answers[name].all[message.choice]
                assert answer.end is None, "a chunk after the end"
                assert answer.reason is None, "a chunk after the last one"
                assert index == len(answer.token_ids), "chunks are not contiguous"
                answer.token_ids += ids
                answer.token_times += [self.world.now] * len(ids)
                answer.logprobs += message.logprobs
                answer.trace += message.trace
                last = max((step.index for step in message.trace), default=0)
                assert last < index + max(1, len(ids)), "a step comes before its token"
                answer.text += text
                answer.reason, answer.stop_string = message.finish_reason, message.stop_string
            case (
                Finished(request_id=name)
                | Embedded(request_id=name)
                | RequestFailed(request_id=name)
            ):
                if isinstance(message, Embedded):
                    self.answers[name].embedding = floats_of_frame(tensors[0])
                for answer in self.answers[name].all:
                    assert answer.end is None, "a second end"
                    answer.end, answer.ended_at = message, self.world.now
            case ClientWelcome() | StatusReport() | WorkerDrained() | Pong():
                self.others.append(message)
            case Refused():
                self.others.append(message)
                self.vanish()
            case _:
                raise AssertionError(f"unexpected {message}")

    def _ping(self) -> None:
        if not self.gone:
            self.say(Ping())
            self.world.at(5.0, self._ping)


class FakeDetokenizer:
    """One letter per token; what may be the beginning of a stop string waits."""

    def __init__(self, rules: events.TextRules) -> None:
        self._stops = rules.stop_strings
        self.grammar = rules.grammar.text if rules.grammar else ""
        self._ids: list[int] = []
        self._text = ""
        self._given = 0
        self._count = 0

    def feed(
        self, key: RequestKey, choice: int, ids: Iterable[int], *, last: bool
    ) -> events.Detokenized:
        """Return what the core is told."""
        for token in ids:
            assert not self.grammar or token in {*admitted(self.grammar, self._ids), EOS}
            self._ids.append(token)
            self._text += text_of([token])
            self._count += 1
            found = [(at, stop) for stop in self._stops if (at := self._text.find(stop)) >= 0]
            if found:
                at, stop = min(found)
                text = self._text[self._given : at]
                return events.Detokenized(key, choice, text, self._count, stop, last)
        may_follow = admitted(self.grammar, self._ids)
        end = len(self._text) if last or not may_follow else len(self._text) - self._held()
        text, self._given = self._text[self._given : end], end
        return events.Detokenized(
            key,
            choice,
            text,
            self._count,
            stop_string=None,
            last=last,
            mask=self.mask(),
            complete=not may_follow,
        )

    def mask(self) -> bytes:
        """Return which tokens may be next; empty without a grammar, and if none may."""
        may_follow = admitted(self.grammar, self._ids)
        return mask_of(may_follow) if self.grammar and may_follow else b""

    def _held(self) -> int:
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        return next(
            (
                n
                for n in range(min(longest, len(self._text) - self._given), 0, -1)
                if any(stop.startswith(self._text[-n:]) for stop in self._stops)
            ),
            0,
        )


def text_of(token_ids: Iterable[int]) -> str:
    """Return the text of tokens, one letter for each."""
    return "".join(chr(0x4E00 + token) for token in token_ids)
