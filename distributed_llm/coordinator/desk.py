"""Requests from arrival to their last message. Pure.

Every request ends with exactly one of `Finished` and `RequestFailed`, unless its client is gone.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from distributed_llm.common.errors import (
    ContextLengthExceeded,
    DistributedLLMError,
    InvalidRequest,
    NotEnoughMemory,
    Overloaded,
    RequestCancelled,
    StageError,
    WorkerLost,
)
from distributed_llm.common.messages import (
    Finished,
    Generate,
    RequestFailed,
    RequestId,
    TaskFailed,
    TokenChunk,
)
from distributed_llm.common.tensors import Frame
from distributed_llm.common.types import PeerId, WorkerId
from distributed_llm.coordinator.events import (
    Action,
    Detokenize,
    Detokenized,
    Forget,
    Log,
    Send,
    Tokenize,
    Tokenized,
)
from distributed_llm.coordinator.requests import (
    GenerationDefaults,
    Phase,
    Request,
    RequestKey,
    resolve,
)
from distributed_llm.coordinator.scheduler import Scheduler, Step, restart

_MAX_LOSSES = 3
_MAX_FAILURES = 2
_MAX_MISSING = 3
_MAX_BYTES_PER_TOKEN = 64
"""Of a prompt; no text comes near it on average, so what is longer need not be tokenized."""
_MIN_PROMPT_BYTES = 64 * 1024


@dataclass
class Totals:
    """What has come of all requests."""

    finished: int = 0
    failed: int = 0
    tokens: int = 0


class Desk:
    """All requests of all clients.

    Args:
        defaults: of the checkpoint.
        scheduler: takes the requests whose prompt is known.
        max_waiting: requests that may wait; more are refused.
        draw_seed: gives a seed for a request without one.
    """

    def __init__(
        self,
        defaults: GenerationDefaults,
        scheduler: Scheduler,
        *,
        max_waiting: int,
        draw_seed: Callable[[], int],
    ) -> None:
        self._defaults = defaults
        self._scheduler = scheduler
        self._max_waiting = max_waiting
        self._draw_seed = draw_seed
        self._requests: dict[tuple[PeerId, RequestId], Request] = {}
        self._next_sequence = 0
        self._kv_tokens = 0
        self._freed: list[int] = []
        self.totals = Totals()

    @property
    def busy(self) -> bool:
        """Whether any request is under way."""
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        """Requests with KV cache."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests that are being tokenized or wait for room."""
        waiting = (Phase.TOKENIZING, Phase.WAITING)
        return sum(request.phase in waiting for request in self._requests.values())

    def take_freed(self) -> list[int]:
        """Return the sequences whose KV cache is to be freed on every stage, once."""
        freed, self._freed = self._freed, []
        return freed

    def set_capacity(self, kv_tokens: int) -> list[Action]:
        """A new plan has room for `kv_tokens` positions; all requests start on it anew."""
        self._freed.clear()
        self._kv_tokens = kv_tokens
        self._scheduler.set_capacity(kv_tokens)
        actions: list[Action] = []
        for request in list(self._scheduler.waiting):
            if request.reserved_tokens > kv_tokens:
                error = NotEnoughMemory(
                    f"The request may take {request.reserved_tokens} positions, but after workers "
                    f"left there is room for {kv_tokens}. Add a worker or lower max_new_tokens."
                )
                actions += self.fail(request.key, error)
        return actions

    def expect_capacity(self, kv_tokens: int) -> None:
        """A plan with this much room is being prepared."""
        self._kv_tokens = kv_tokens

    def submit(
        self, peer: PeerId, message: Generate, frames: tuple[Frame, ...], *, now: float
    ) -> list[Action]:
        """Take a new request."""
        if self.num_waiting >= self._max_waiting:
            error = Overloaded(
                f"{self.num_waiting} requests wait already, which is the limit. Try again later.",
                retry_after_s=self._retry_after_s(),
            )
            return self.refuse(peer, message.request_id, error)
        wrong = self._wrong_prompt(message)
        if wrong:
            return self.refuse(peer, message.request_id, wrong)
        number = self._next_sequence
        self._next_sequence += 1
        key = (peer, message.request_id, number)
        self._requests[key[:2]] = Request(key, number, message.params, arrived_at=now)
        payload = bytes(frames[0]) if frames else b""
        return [Tokenize(key, message.prompt, payload, message.params.stop_strings)]

    def _wrong_prompt(self, message: Generate) -> InvalidRequest | None:
        wanted = "int32" if message.prompt == "token_ids" else "uint8"
        context = self._defaults.context_length
        limit = max(_MIN_PROMPT_BYTES, _MAX_BYTES_PER_TOKEN * context)
        for spec in message.tensors:
            if spec.dtype != wanted:
                return InvalidRequest(f"A {message.prompt} prompt travels as {wanted}, not {spec}.")
            if spec.nbytes > limit:
                return ContextLengthExceeded(
                    f"The prompt has {spec.nbytes} bytes, which no context of {context} tokens can "
                    "hold. Shorten it."
                )
        return None

    def refuse(
        self, peer: PeerId, request_id: RequestId, error: DistributedLLMError
    ) -> list[Action]:
        """Answer a request that is not taken."""
        self.totals.failed += 1
        return [_failure(peer, request_id, error)]

    def has(self, peer: PeerId, request_id: RequestId) -> bool:
        """Return whether a request of this name is under way."""
        return (peer, request_id) in self._requests

    def tokenized(self, event: Tokenized) -> list[Action]:
        """The prompt of a request is known: queue it."""
        request = self._find(event.key)
        if request is None:
            return []
        vocab = self._defaults.vocab_size
        strange = next((t for t in event.token_ids if not 0 <= t < vocab), None)
        if strange is not None:
            error = InvalidRequest(
                f"Token id {strange} is not in the model's vocabulary of {vocab}."
            )
            return self.fail(event.key, error)
        try:
            limits = resolve(
                request.params,
                self._defaults,
                prompt_tokens=len(event.token_ids),
                kv_tokens=self._kv_tokens,
                seed=self._draw_seed(),
            )
        except DistributedLLMError as exc:
            return self.fail(event.key, exc)
        request.accept(event.token_ids, limits)
        self._scheduler.add(request)
        return []

    def fail(self, key: RequestKey, error: DistributedLLMError) -> list[Action]:
        """End a request with an error, if it is still under way."""
        request = self._find(key)
        if request is None:
            return []
        self._retire(request)
        self.totals.failed += 1
        return [_failure(*key[:2], error), Forget(key)]

    def cancel(self, peer: PeerId, request_id: RequestId) -> list[Action]:
        """End a request because its client wants it."""
        request = self._requests.get((peer, request_id))
        error = RequestCancelled("The request was cancelled.")
        return self.fail(request.key, error) if request else []

    def drop_client(self, peer: PeerId) -> list[Action]:
        """End all requests of a client that is gone."""
        requests = [r for r in self._requests.values() if r.key[0] == peer]
        for request in requests:
            self._retire(request)
            self.totals.failed += 1
        return [Forget(request.key) for request in requests]

    def fail_all(self, error: DistributedLLMError) -> list[Action]:
        """End every request with an error, but those that only wait for the text of their end."""
        keys = [r.key for r in self._requests.values() if r.phase is not Phase.CLOSING]
        return [action for key in keys for action in self.fail(key, error)]

    def step_done(self, step: Step, token_ids: Iterable[int], *, now: float) -> list[Action]:
        """A step ran: its requests have a token more."""
        self._scheduler.complete(step)
        self._free_gone(step)
        actions: list[Action] = []
        for request, token in zip(step.sampling, token_ids, strict=True):
            if request.phase is Phase.RUNNING:
                actions += self._append(request, token, now)
        return actions

    def step_broken(self, step: Step, failure: TaskFailed, worker: WorkerId) -> list[Action]:
        """A stage could not run a step: compute again, alone if that may help, or give up."""
        self._scheduler.abandon(step)
        self._free_gone(step)
        missing = {m.sequence_id for m in failure.missing}
        missing &= {request.sequence_id for request in step.requests}
        actions: list[Action] = [
            Log(f"worker {worker} failed a step: {failure.code}: {failure.message}", "warning")
        ]
        for request in step.requests:
            if request.phase is not Phase.RUNNING:
                continue
            if missing:
                if request.sequence_id not in missing:
                    continue
                restart(request)
            request.failures += 1
            request.alone = True
            limit = _MAX_MISSING if missing else _MAX_FAILURES
            if request.failures >= limit:
                error = StageError(
                    f"Worker {worker} failed on this request {request.failures} times: "
                    f"{failure.message} Look into the worker's log."
                )
                actions += self.fail(request.key, error)
        return actions

    def steps_lost(self, steps: Iterable[Step], worker: WorkerId) -> list[Action]:
        """A worker died over these steps: suspect their requests, give up the worst."""
        actions: list[Action] = []
        for step in steps:
            for request in step.requests:
                request.losses += 1
                request.alone = True
                if request.losses >= _MAX_LOSSES:
                    error = WorkerLost(
                        f"{request.losses} workers in a row died while they worked on this "
                        f"request, the last one {worker}. It is not tried again."
                    )
                    actions += self.fail(request.key, error)
        return actions

    def detokenized(self, event: Detokenized) -> list[Action]:
        """Text of an answer is known: send it, and the end if this is it."""
        request = self._find(event.key)
        if request is None:
            return []
        actions: list[Action] = []
        stop = request.num_prompt_tokens + event.num_tokens
        new = tuple(request.token_ids[request.num_prompt_tokens + request.num_sent_tokens : stop])
        if new or event.text:
            chunk = TokenChunk(
                request_id=request.key[1],
                index=request.num_sent_tokens,
                text=event.text,
                token_ids=new,
            )
            actions.append(Send(request.key[0], chunk))
            request.num_sent_tokens += len(new)
        if event.stopped:
            del request.token_ids[stop:]
            request.finish_reason = "stop"
        if event.stopped or event.last:
            actions += self._finish(request)
        return actions

    def _append(self, request: Request, token: int, now: float) -> list[Action]:
        request.append(token, now=now)
        self.totals.tokens += 1
        last = request.finish_reason is not None
        if last:
            request.phase = Phase.CLOSING
            if self._scheduler.remove(request):
                self._freed.append(request.sequence_id)
        return [Detokenize(request.key, (token,), last)]

    def _finish(self, request: Request) -> list[Action]:
        assert request.finish_reason is not None
        finished = Finished(
            request_id=request.key[1],
            finish_reason=request.finish_reason,
            usage=request.usage(),
            timings=request.timings(),
        )
        self._retire(request)
        self.totals.finished += 1
        return [Send(request.key[0], finished), Forget(request.key)]

    def _find(self, key: RequestKey) -> Request | None:
        """Return the request, unless it has ended; another one may have its id by now."""
        request = self._requests.get(key[:2])
        return request if request is not None and request.key == key else None

    def _retire(self, request: Request) -> None:
        del self._requests[request.key[:2]]
        request.phase = Phase.GONE
        if self._scheduler.remove(request) and not request.in_flight:
            self._freed.append(request.sequence_id)

    def _free_gone(self, step: Step) -> None:
        """Free what ended while the step was under way; before, later stages would start anew."""
        self._freed += [r.sequence_id for r in step.requests if r.phase is Phase.GONE]

    def _retry_after_s(self) -> float:
        return max(1.0, 0.1 * self.num_waiting)

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        self._scheduler.validate()
        scheduled = [r.key for r in (*self._scheduler.waiting, *self._scheduler.running)]
        assert len(set(scheduled)) == len(scheduled)
        assert set(scheduled) <= {r.key for r in self._requests.values()}
        for name, request in self._requests.items():
            assert request.key == (*name, request.sequence_id)
            queued = request.phase in (Phase.WAITING, Phase.RUNNING)
            assert queued == (request.key in scheduled)


def _failure(peer: PeerId, request_id: RequestId, error: DistributedLLMError) -> Send:
    retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else 0.0
    return Send(
        peer,
        RequestFailed(
            request_id=request_id,
            code=error.code,
            message=str(error)[:4096],
            retry_after_s=retry_after_s,
        ),
    )
