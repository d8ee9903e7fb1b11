"""Workers of this machine, asked as `benchmarks.engine` asks other engines."""

import asyncio
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Answer, ask, fresh_prompts, gather
from benchmarks.peers import Question
from distributed_llm import AsyncDistributedClient, LocalCluster


class ClusterPeer:
    """A coordinator and workers with the model split over them.

    Attributes:
        name: how tables call it.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        self.name = f"{workers} worker{'s' if workers > 1 else ''}"
        self._cluster = LocalCluster(folder, workers=workers, coordinator={"strategy": "memory"})

    def __enter__(self) -> "ClusterPeer":
        self._cluster.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._cluster.__exit__(*exc_info)

    def ask(self, question: Question) -> dict[str, Any]:
        """Send all requests at once; return the seconds until all have a token, and from then."""
        return asyncio.run(self._ask(question))

    async def _ask(self, question: Question) -> dict[str, Any]:
        prompts = fresh_prompts(question.sequences, question.prompt_tokens)
        async with AsyncDistributedClient(self._cluster.address) as client:
            await client.status()
            began = time.perf_counter()
            answers = await gather(ask(client, p, question.new_tokens) for p in prompts)
        return _times(began, answers)


def _times(began: float, answers: list[Answer]) -> dict[str, Any]:
    first = max(answer.times[0] for answer in answers)
    last = max(answer.times[-1] for answer in answers)
    return {"prefill_s": first - began, "decode_s": last - first}
