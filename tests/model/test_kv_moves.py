"""Caches of several stages, moved at any time among any steps, hold what was computed."""

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from distributed_llm.common.types import KV_BLOCK, LayerRange, SequenceId
from distributed_llm.worker.kv.assembly import assemble
from distributed_llm.worker.kv.cache import KVCache, as_token_ids
from distributed_llm.worker.kv.transfer import KVExporter, KVImporter
from tests.model.test_kv_transfer import TOKEN_BYTES, compute, contents, importer, new_cache

NUM_LAYERS = 4
SPLITS = ((1, 2, 1), (2, 1, 1), (1, 1, 2), (1, 1, 1, 1), (4,), (2, 2), (3, 1), (1, 3))
NUM_WORKERS = 4


def ranges(split: Sequence[int]) -> list[LayerRange]:
    stops = [sum(split[: i + 1]) for i in range(len(split))]
    return [LayerRange(stop - count, stop) for count, stop in zip(split, stops, strict=True)]


class Held:
    """What one worker holds, if anything."""

    def __init__(self, layers: LayerRange, *, in_pages: bool) -> None:
        self.layers = layers
        self.cache = new_cache(layers, in_pages=in_pages)


class Transfer:
    """Layers on their way from one worker to another."""

    def __init__(self, source: Held, layers: LayerRange) -> None:
        self.source = source
        self.out = KVExporter(source.cache, source.layers, layers)
        self.into: KVImporter = importer(layers)

    def pump(self, max_bytes: int) -> bool:
        pieces = self.out.next_chunk(max_bytes, 100)
        for piece in pieces or []:
            self.into.add(piece)
        return pieces is not None


Plan = list[tuple[int, Held, list[Transfer]]]
"""By worker of the new plan: its number, its empty cache, and the transfers that fill it."""


class MoveMachine(RuleBasedStateMachine):
    """Workers hold the stages of a pipeline; a twin does the same steps and never moves."""

    in_pages = False

    def __init__(self) -> None:
        super().__init__()
        self.workers: list[Held | None] = [None] * NUM_WORKERS
        self.order: list[int] = [0, 1, 2]
        for worker, layers in zip(self.order, ranges(SPLITS[0]), strict=True):
            self.workers[worker] = Held(layers, in_pages=self.in_pages)
        self.twin = Held(LayerRange(0, NUM_LAYERS), in_pages=False)
        self.model: dict[int, list[int]] = {}
        self.next_id = self.next_token = 0
        self.equal = True  # no step was abandoned, so capacities are the twin's too

    def stages(self) -> list[Held]:
        return [held for worker in self.order if (held := self.workers[worker]) is not None]

    def caches(self) -> list[KVCache]:
        return [held.cache for held in (*self.stages(), self.twin)]

    def fresh(self, count: int) -> list[int]:
        self.next_token += count
        return list(range(self.next_token - count, self.next_token))

    def step(self, sequence_id: int, start: int, tokens: list[int]) -> None:
        for held in (*self.stages(), self.twin):
            compute(held.cache, held.layers, sequence_id, start, tokens)
        self.model[sequence_id] = self.model.get(sequence_id, [])[:start] + tokens

    @rule(count=st.integers(1, 150))
    def new(self, count: int) -> None:
        if len(self.model) < 5:
            self.next_id += 1
            self.step(self.next_id, 0, self.fresh(count))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(1, 100), back=st.integers(0, 80), again=st.booleans())
    def one_step(self, data: st.DataObject, count: int, back: int, again: bool) -> None:
        self.go_on(data, count, back, again)

    def go_on(self, data: st.DataObject, count: int, back: int, again: bool) -> None:
        """Compute a sequence from its end on or from before; maybe the same tokens again."""
        sequence_id = data.draw(st.sampled_from(sorted(self.model)))
        start = max(0, len(self.model[sequence_id]) - back)
        tokens = self.model[sequence_id][start:] if again else []
        self.step(sequence_id, start, tokens or self.fresh(count))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(1, 100), take=st.booleans())
    def share(self, data: st.DataObject, count: int, take: bool) -> None:
        parent = data.draw(st.sampled_from(sorted(self.model)))
        length = data.draw(st.integers(1, len(self.model[parent])))
        self.next_id += 1
        for cache in self.caches():
            cache.share(SequenceId(self.next_id), SequenceId(parent), length)
            if take:
                cache._pass_ownership(SequenceId(parent), SequenceId(self.next_id))
                cache.free([SequenceId(parent)])
        self.model[self.next_id] = self.model[parent][:length]
        if take:
            del self.model[parent]
        self.step(self.next_id, length, self.fresh(count))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(1, 100), back=st.integers(0, 80), again=st.booleans())
    def one_step_that_is_abandoned(
        self, data: st.DataObject, count: int, back: int, again: bool
    ) -> None:
        self.abandon(data, count, back, again)

    def abandon(self, data: st.DataObject, count: int, back: int, again: bool) -> None:
        """Run a step on the first stages alone, and on the next one in part."""
        self.equal = False
        sequence_id = data.draw(st.sampled_from(sorted(self.model)))
        start = max(0, len(self.model[sequence_id]) - back)
        tokens = self.model[sequence_id][start:] if again else []
        tokens = tokens or self.fresh(count)
        stages = self.stages()
        done = data.draw(st.integers(0, len(stages) - 1))
        for held in stages[:done]:
            compute(held.cache, held.layers, sequence_id, start, tokens)
        stages[done].cache.begin(SequenceId(sequence_id), start, as_token_ids(tokens))
        # The coordinator goes back to what all stages still hold, and no further.
        self.model[sequence_id] = self.model[sequence_id][:start]
        if not start:
            self.free([sequence_id])

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.model)))) if self.model else []
        self.free(ids)

    def free(self, sequence_ids: list[int]) -> None:
        for cache in self.caches():
            cache.free(map(SequenceId, sequence_ids))
        for sequence_id in sequence_ids:
            self.model.pop(sequence_id, None)

    @rule(data=st.data(), split=st.sampled_from(SPLITS), steps=st.integers(0, 4))
    def move(self, data: st.DataObject, split: tuple[int, ...], steps: int) -> None:
        """Move to another split, by any workers in any order, while steps run."""
        plan = self.prepare(data, split)
        for _ in range(steps):
            for _, _, transfers in plan:
                for transfer in transfers:
                    transfer.pump(data.draw(st.sampled_from([1, 5000, 200_000])))
                    if data.draw(st.booleans()):
                        transfer.into.update(transfer.source.cache.manifest())
            if self.model:
                act = data.draw(st.sampled_from([self.go_on, self.go_on, self.abandon]))
                act(data, data.draw(st.integers(1, 100)), data.draw(st.integers(0, 80)), False)
        if data.draw(st.booleans()):
            self.commit(plan)

    def prepare(self, data: st.DataObject, split: tuple[int, ...]) -> Plan:
        plan: Plan = []
        order = data.draw(st.permutations(range(NUM_WORKERS)))[: len(split)]
        for worker, layers in zip(order, ranges(split), strict=True):
            own = self.workers[worker]
            transfers = []
            for held in self.stages():
                start = max(held.layers.start, layers.start)
                stop = min(held.layers.stop, layers.stop)
                if held is not own and start < stop:
                    transfers.append(Transfer(held, LayerRange(start, stop)))
            plan.append((worker, Held(layers, in_pages=self.in_pages), transfers))
        return plan

    def commit(self, plan: Plan) -> None:
        old = list(self.workers)
        self.workers = [None] * NUM_WORKERS
        self.order = [worker for worker, _, _ in plan]
        for worker, new, transfers in plan:
            for transfer in transfers:
                left = transfer.out.remaining_bytes
                before = transfer.into.nbytes
                while transfer.pump(3000):
                    assert transfer.out.remaining_bytes < left
                    left = transfer.out.remaining_bytes
                assert left == 0
                assert transfer.into.nbytes >= before
                transfer.into.update(transfer.source.cache.manifest())
            own = old[worker]
            assemble(
                new.cache,
                new.layers,
                (own.cache, own.layers) if own else None,
                [transfer.into for transfer in transfers],
            )
            self.workers[worker] = new

    @invariant()
    def every_held_position_is_right_in_every_layer(self) -> None:
        for held in (*self.stages(), self.twin):
            for sequence_id, tokens in self.model.items():
                count = len(tokens)
                assert held.cache.length(SequenceId(sequence_id)) >= count
                assert held.cache.tokens(SequenceId(sequence_id), count).tolist() == tokens
                for row in contents(held.cache, held.layers, sequence_id):
                    assert row[:count] == tokens

    @invariant()
    def memory_is_as_if_nothing_had_moved(self) -> None:
        for held in self.stages():
            capacity = held.cache.capacity
            assert held.cache.nbytes <= capacity * len(held.layers) * TOKEN_BYTES
            assert capacity % KV_BLOCK == 0
            if self.equal:
                assert capacity == self.twin.cache.capacity
                assert held.cache.nbytes == capacity * len(held.layers) * TOKEN_BYTES
                assert set(held.cache.sequence_ids) == set(self.model)

    def teardown(self) -> None:
        self.free([*self.model, *(i for cache in self.caches() for i in cache.sequence_ids)])
        for cache in self.caches():
            assert (cache.nbytes, cache.capacity, cache.sequence_ids) == (0, 0, ())


MoveMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True
)
TestMoves = MoveMachine.TestCase


class PagesMachine(MoveMachine):
    """The same with workers whose caches are in pages."""

    in_pages = True


PagesMachine.TestCase.settings = settings(MoveMachine.TestCase.settings, max_examples=15)
TestMovesOfPages = PagesMachine.TestCase
