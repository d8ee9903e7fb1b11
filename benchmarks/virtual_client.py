"""Clients of a virtual cluster, and what they see of it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distributed_llm.common.messages import (
    ClientHello,
    Finished,
    Generate,
    Ping,
    RequestFailed,
    TokenChunk,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.tensors import Frame, frame_of_token_ids
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator import events

if TYPE_CHECKING:
    from benchmarks.virtual_cluster import VirtualCluster

_PING_S = 10.0


@dataclass
class Seen:
    """What all clients have seen; times in virtual seconds.

    Attributes:
        ttft_s: from asking to the first token; per request.
        gaps_s: between tokens of one answer; `queued_s` from arrival to the first step.
        ended: requests by what they ended with; "finished" is none of the errors.
        fairness: Jain's index of the tokens that clients with standing demand got in a window.
        tokens: of all answers.
    """

    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    queued_s: list[float] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)
    fairness: list[float] = field(default_factory=list)
    tokens: int = 0


def jain(shares: Sequence[float]) -> float:
    """Return Jain's index of fairness: 1 if all are equal, 1/n if one has everything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


@dataclass
class _Asked:
    """A request of a client: when it was asked, and when its latest token came."""

    asked_at: float
    prompt_tokens: int
    token_at: float | None = None


class VirtualClient:
    """Asks, and notes what comes when."""

    def __init__(self, cluster: "VirtualCluster", name: str) -> None:
        self.cluster, self.peer = cluster, PeerId(name.encode())
        self._open: dict[str, _Asked] = {}
        self._numbers = 0
        self._waiting = 0  # requests without a token
        self._served = 0  # tokens, of prompts too, in this window
        self._had_none = True  # waiting, at some time in this window

    def start(self) -> None:
        """Say hello, and be alive from now."""
        self._say(ClientHello())
        self._ping()

    def _ping(self) -> None:
        self._say(Ping())
        self.cluster.at(self.cluster.now + _PING_S, self._ping)

    def _say(self, message: ClientHello | Ping | Generate, frames: tuple[Frame, ...] = ()) -> None:
        when = self.cluster.now + self.cluster.coordinator_delay_s
        self.cluster.at(when, self.cluster.apply, events.Received(self.peer, message, frames))

    def ask(self, prompt: Sequence[int], answer_tokens: int) -> None:
        """Send a request."""
        name = f"r{self._numbers}"
        self._numbers += 1
        self._waiting += 1
        self._open[name] = _Asked(self.cluster.now, len(prompt))
        spec, frame = frame_of_token_ids(prompt)
        params = SamplingParams(max_new_tokens=answer_tokens)
        message = Generate(request_id=name, prompt="token_ids", params=params, tensors=(spec,))
        self._say(message, (frame,))

    def receive(self, message: object) -> None:
        """Take a message; it arrives after the delay of the link, which changes nothing here."""
        now = self.cluster.now + self.cluster.coordinator_delay_s
        match message:
            case TokenChunk():
                self._token(message, now)
            case Finished():
                self.cluster.seen.queued_s.append(message.timings.queued_s)
                self._end(message.request_id, "finished")
            case RequestFailed():
                self._end(message.request_id, message.code)

    def _token(self, chunk: TokenChunk, now: float) -> None:
        seen, asked = self.cluster.seen, self._open[chunk.request_id]
        seen.tokens += len(chunk.token_ids)
        self._served += len(chunk.token_ids)
        if asked.token_at is None:
            seen.ttft_s.append(now - asked.asked_at)
            self._served += asked.prompt_tokens
            self._started()
        else:
            seen.gaps_s.append(now - asked.token_at)
        asked.token_at = now

    def _started(self) -> None:
        self.cluster.request_started()
        self._waiting -= 1
        self._had_none |= not self._waiting

    def _end(self, request_id: str, how: str) -> None:
        if self._open.pop(request_id).token_at is None:
            self._started()
        self.cluster.seen.ended[how] += 1

    def end_window(self) -> float | None:
        """Return the tokens served since the last call, or None if it did not wait all along."""
        served, stood = self._served, not self._had_none
        self._served, self._had_none = 0, not self._waiting
        return float(served) if stood else None
