"""Clients that ask one request after the other, each with an answer that is known beforehand."""

import asyncio
import random
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import torch
from transformers import AutoModelForCausalLM

from distributed_llm import AsyncDistributedClient
from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.common.messages import ClusterStatus

_BATCH = 128
_LEAST_MARGIN = 1e-3
"""Of the likeliest token over the second, in the reference's logits. Where they are closer, the
order in which numbers are added up may decide; such prompts are not asked."""


@dataclass(frozen=True)
class Example:
    """A prompt, and the greedy answer of `transformers.generate` in float32."""

    prompt: list[int]
    answer: list[int]


def make_examples(
    folder: Path, count: int, *, prompt_tokens: int, new_tokens: int
) -> list[Example]:
    """Return examples of a checkpoint, all different; they are kept in its folder."""
    kept = folder / f"examples-{prompt_tokens}-{new_tokens}.json"
    found: list[Example] = []
    if kept.exists():
        found = msgspec.json.decode(kept.read_bytes(), type=list[Example])
    if len(found) < count:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a small model is slower with more
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        draw = random.Random(len(found))
        while len(found) < count:
            found += _answered(model, draw, prompt_tokens, new_tokens)
        torch.set_num_threads(threads)
        kept.write_bytes(msgspec.json.encode(found))
    return found[:count]


def _answered(
    model: Any, draw: random.Random, prompt_tokens: int, new_tokens: int
) -> list[Example]:
    vocab_size = model.config.vocab_size
    prompts = [draw.choices(range(vocab_size), k=prompt_tokens) for _ in range(_BATCH)]
    ids = torch.tensor(prompts)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    two = torch.stack(made.logits).topk(2).values  # [new tokens, prompts, 2]
    margins = (two[..., 0] - two[..., 1]).amin(0)
    answers = made.sequences[:, prompt_tokens:].tolist()
    return [
        Example(prompt, answer)
        for prompt, answer, margin in zip(prompts, answers, margins.tolist(), strict=True)
        if margin >= _LEAST_MARGIN
    ]


@dataclass
class Asked:
    """A request.

    Attributes:
        times: of its tokens, `perf_counter` seconds.
        outcome: "right", "wrong", or the code of an error; empty while it runs.
    """

    times: list[float] = field(default_factory=list)
    outcome: str = ""


@dataclass(frozen=True)
class Gap:
    """Between two tokens of a request, `perf_counter` seconds."""

    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """How long."""
        return self.end - self.begin


class SteadyLoad:
    """Clients that ask as soon as they have been answered; an async context manager.

    Their first requests are of different lengths, so that later ones do not begin all at once.

    Args:
        address: of the coordinator.
        examples: enough of them; each is asked once.
        clients: how many.

    Attributes:
        asked: all requests, in the order in which they were sent.
    """

    def __init__(self, address: str, examples: list[Example], clients: int = 8) -> None:
        self._client = AsyncDistributedClient(address)
        self._left: Iterator[Example] = iter(examples)
        self._clients = clients
        self._tasks: list[asyncio.Task[None]] = []
        self.asked: list[Asked] = []
        self.errors: list[str] = []

    async def __aenter__(self) -> Self:
        shares = ((number + 1) / self._clients for number in range(self._clients))
        self._tasks = [asyncio.create_task(self._ask_on(share)) for share in shares]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()

    async def finish(self) -> None:
        """Ask nothing more, and wait until all is answered."""
        self._left = iter(())
        await asyncio.gather(*self._tasks)

    async def _ask_on(self, share: float) -> None:
        while (example := next(self._left, None)) is not None:
            new_tokens = max(1, round(share * len(example.answer)))
            example, share = Example(example.prompt, example.answer[:new_tokens]), 1.0
            asked = Asked()
            self.asked.append(asked)
            try:
                asked.outcome = await self._ask(example, asked)
            except DistributedLLMError as exc:
                asked.outcome = exc.code
                self.errors.append(f"{exc.code}: {exc}")

    async def _ask(self, example: Example, asked: Asked) -> str:
        new_tokens = len(example.answer)
        chunks = self._client.stream(
            example.prompt, max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True
        )
        got: list[int] = []
        async with aclosing(chunks):
            async for chunk in chunks:
                asked.times += [time.perf_counter()] * len(chunk.token_ids)
                got += chunk.token_ids
        return "right" if got == example.answer else "wrong"

    async def status(self) -> ClusterStatus:
        """Return the cluster as the coordinator sees it."""
        return await self._client.status()

    # -------------------------------------------------------------- what came of it

    @property
    def everybody_answered(self) -> bool:
        """Whether every client has had a token, or an error."""
        first = self.asked[: self._clients]
        return len(first) == self._clients and all(a.times or a.outcome for a in first)

    @property
    def outcomes(self) -> Counter[str]:
        """Requests that have ended, by how."""
        return Counter(asked.outcome for asked in self.asked if asked.outcome)

    def tokens_per_s(self, begin: float, end: float) -> float:
        """Return the rate of all answers between two times."""
        count = sum(bisect_left(a.times, end) - bisect_left(a.times, begin) for a in self.asked)
        return count / (end - begin)

    def gaps(self, begin: float, end: float) -> list[Gap]:
        """Return the gaps that have a part between two times."""
        return [
            Gap(before, after)
            for asked in self.asked
            for before, after in pairwise(asked.times)
            if after > begin and before < end
        ]
