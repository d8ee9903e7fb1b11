"""Decides which decode steps become graphs, and which graphs are kept. Pure."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from distributed_llm.worker.model.decode_graphs.buckets import Bucket

MOST_GRAPHS = 32
"""Graphs that are kept; each takes the driver some memory."""

_SEEN_BEFORE = 1
"""Steps of a bucket that are computed as ever before one is recorded: most sizes pass by once."""

G = TypeVar("G")


class GraphBook(Generic[G]):
    """The graphs of one stage, and the steps that may become some.

    Args:
        room_bytes: of device memory that they may take together.

    Attributes:
        taken_bytes: of device memory.
    """

    def __init__(self, room_bytes: int) -> None:
        self.taken_bytes = 0
        self._refusal = ""
        self._full = ""
        self._room_bytes = room_bytes
        self._graphs: OrderedDict[Bucket, G] = OrderedDict()  # the latest used last
        self._seen: dict[Bucket, int] = {}
        self._made_for: Hashable = None

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def refusal(self) -> str:
        """Why no more graphs are made; "" if they are."""
        return self._refusal or self._full

    def valid_for(self, memory: Hashable) -> bool:
        """Forget all graphs if they compute on other memory than this; return whether they do not.

        Args:
            memory: equal as long as weights, KV cache and all else lie where they are.
        """
        if memory == self._made_for:
            return True
        self._made_for = memory
        self.forget()
        return False

    def graph_for(self, bucket: Bucket) -> G | None:
        """Return the graph for steps of these sizes, which counts as used."""
        graph = self._graphs.get(bucket)
        if graph is not None:
            self._graphs.move_to_end(bucket)
        return graph

    def wants(self, bucket: Bucket) -> bool:
        """Return whether a step of these sizes, for which there is no graph, is to become one."""
        if self.refusal:
            return False
        seen = self._seen[bucket] = self._seen.get(bucket, 0) + 1
        return seen > _SEEN_BEFORE

    def keep(self, bucket: Bucket, graph: G, taken_bytes: int) -> None:
        """Keep a graph; the one that was used longest ago goes if there are too many.

        Memory that graphs share stays theirs when one goes, for the next one. Once there is too
        little left for as much again, no more are made until all are forgotten. They are at once if
        this one has taken more than there was.

        Args:
            bucket: that it is for.
            graph: that computes rightly.
            taken_bytes: of device memory that making it has taken.
        """
        taken = max(0, taken_bytes)  # others may have given some back meanwhile
        self._graphs[bucket] = graph
        self.taken_bytes += taken
        told = f"they take {self.taken_bytes >> 20} MiB of {self._room_bytes >> 20} MiB"
        if self.taken_bytes > self._room_bytes:
            self.forget()
            self._full = told
        elif self.taken_bytes + taken > self._room_bytes:
            self._full = told
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)

    def refuse(self, why: str) -> None:
        """Have no more graphs made, ever; those that are kept stay."""
        self._refusal = why

    def forget(self) -> None:
        """Drop all graphs."""
        self._graphs.clear()
        self._seen.clear()
        self.taken_bytes, self._full = 0, ""
