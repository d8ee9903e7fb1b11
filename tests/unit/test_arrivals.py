"""Tensors on their way into the cache: written in order, dropped, begun anew."""

from pathlib import Path

from distributed_llm.common.errors import CheckpointError
from distributed_llm.weights.arrivals import ArrivalEvent, Arrivals
from distributed_llm.weights.cache.content_cache import ContentCache
from distributed_llm.weights.fetching.events import (
    Check,
    Claim,
    Forget,
    TensorClaimed,
    TensorStored,
    Written,
)
from distributed_llm.weights.giving.shelf import Shelf
from tests.unit.cache_parts import DATA, NAME
from tests.wire.test_transport import Inbox, on_loop


@on_loop
async def test_what_is_dropped_leaves_nothing_behind(tmp_path: Path) -> None:
    cache, shelf, events = ContentCache(tmp_path, None), Shelf(), Inbox()
    errors: list[CheckpointError] = []
    came: list[int] = []

    def told(event: ArrivalEvent) -> None:
        events.put(event)

    arrivals = Arrivals(cache, shelf, came.append, on_event=told, on_error=errors.append)
    try:
        assert arrivals.expect("a", NAME, len(DATA))
        assert not arrivals.expect("b", NAME, len(DATA)), "the same bytes"
        arrivals.perform(Claim(NAME))
        await events.until(1)
        arrivals.keep("pc", NAME, 100, DATA[100:200])
        arrivals.write(NAME)
        assert len(events) == 1, "what belongs before it is missing"
        arrivals.keep("pc", NAME, 0, b"x" * 100)
        arrivals.write(NAME)
        arrivals.keep("pc", NAME, 300, b"x" * 700)  # in memory, not written
        arrivals.perform(Forget(NAME))
        arrivals.keep("mac", NAME, 0, DATA)
        arrivals.write(NAME)
        arrivals.perform(Check(NAME))
        await events.until(4)
        assert [event for (event,) in events] == [
            TensorClaimed(NAME, 0),
            Written(NAME, 200),
            Written(NAME, 1000),
            TensorStored(NAME),
        ]
        for name in ("a", "b"):
            assert arrivals.wait_for(name).file.read_bytes() == DATA
        assert shelf.read(NAME, 0, len(DATA)) == DATA
        assert arrivals.fetched_bytes == sum(came) == 1900
        assert not errors
    finally:
        arrivals.close()
        arrivals.give_up()
