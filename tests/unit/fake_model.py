"""A model that is quick and tells every mistake: its layers, its stages, and what they must give.

A layer is a rolling hash over the positions of a sequence, so a stage that was skipped, repeated or
left with stale positions changes every later token; what a stage is given is checked besides. A
stage counts the memory that a real one would take, and must not need more than it said it has.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from distributed_llm.common.errors import StageError
from distributed_llm.common.messages import (
    LoadStage,
    MissingPositions,
    ModelSource,
    SequenceSlice,
    SharedPrefix,
    Task,
    TokenLogprobs,
)
from distributed_llm.common.sampling_params import Sampling, SamplingParams
from distributed_llm.common.tensors import (
    Frame,
    TensorSpec,
    frame_of_token_ids,
    token_ids_of_frame,
)
from distributed_llm.common.types import KV_BLOCK, LayerRange
from distributed_llm.common.weight_forms import Quantize
from distributed_llm.coordinator.model import GenerationDefaults, ServedModel
from distributed_llm.coordinator.model_cost import ModelCost

NUM_LAYERS = 6
VOCAB = 97
HIDDEN = 4
EOS = 96
POISON = 95
"""A token that no stage can compute."""

CONTEXT = 256
DRAWN_SEED = 11
ENCODER_LAYERS = 2
"""Of an encoder-decoder."""

DECODER_START = (7,)
"""What its answers begin with."""

BIG = 600
"""Memory with which two workers hold the model, and three hold two layers each."""

COST = ModelCost(
    layer_bytes=(100,) * NUM_LAYERS,
    first_bytes=50,
    last_bytes=50,
    shared_bytes=0,
    layer_kv_bytes=(1,) * NUM_LAYERS,
)
MODEL = ServedModel(
    name="simulated",
    source=ModelSource(kind="builtin", name=""),
    dtype="int32",
    wire_dtype="int32",
    cost=COST,
    hidden_size=HIDDEN,
    defaults=GenerationDefaults(CONTEXT, VOCAB, (EOS,), SamplingParams(temperature=0.0)),
    digest=lambda layers: f"digest of {layers}",
    kv_dtype="fp8",
)
_SIZES: tuple[tuple[int, Quantize], ...] = ((50, "int8"), (25, "int4"))
AUTO_MODEL = replace(
    MODEL,
    smaller=tuple(
        replace(COST, layer_bytes=(size,) * NUM_LAYERS, quantize=form) for size, form in _SIZES
    ),
    may_shrink=True,
)
"""The same if weights may have fewer bits where it would not fit otherwise."""


def with_workspace(model: ServedModel) -> ServedModel:
    """Return a model of which a step takes some memory."""
    costs = [replace(cost, workspace_bytes=10) for cost in (model.cost, *model.smaller)]
    return replace(model, cost=costs[0], smaller=tuple(costs[1:]))


def with_states(model: ServedModel) -> ServedModel:
    """Return a model whose layers keep states, as large as 30 positions."""
    sizes = (30,) * NUM_LAYERS
    costs = [replace(cost, layer_state_bytes=sizes) for cost in (model.cost, *model.smaller)]
    return replace(model, cost=costs[0], smaller=tuple(costs[1:]))


def with_sources(model: ServedModel) -> ServedModel:
    """Return an encoder-decoder, whose first layers are the encoder's."""
    kept = (0,) * ENCODER_LAYERS + (1,) * (NUM_LAYERS - ENCODER_LAYERS)
    costs = [
        replace(cost, layer_kv_bytes=kept, encoder_layers=ENCODER_LAYERS)
        for cost in (model.cost, *model.smaller)
    ]
    defaults = replace(model.defaults, decoder_start=DECODER_START)
    return replace(
        model,
        cost=costs[0],
        smaller=tuple(costs[1:]),
        defaults=defaults,
        source_size=model.hidden_size,
    )


_TINTS: dict[Quantize, int] = {"none": 0, "int8": 100, "int4": 200}
"""What makes layers compute otherwise where their weights have fewer bits."""

WINDOW = 20
"""Positions that a token sees in two of three layers."""


def windowed_layers(layers: LayerRange) -> int:
    """Return how many of these layers have a window."""
    return sum(layer % 3 != 2 for layer in range(layers.start, layers.stop))


# ------------------------------------------------------------------ the model


def mix(*values: int) -> int:
    """Return 31 bits that depend on every bit of `values` and on their order."""
    state = 2166136261
    for value in values:
        state = ((state ^ (value & 0xFFFFFFFF)) * 16777619) & 0xFFFFFFFF
        state ^= state >> 15
    return state & 0x7FFFFFFF


def admitted(grammar: str, answer: Sequence[int]) -> list[int]:
    """Return the tokens that may follow by a made-up grammar; none once it is complete.

    Args:
        grammar: how many tokens complete it; empty for none.
    """
    if not grammar:
        return list(range(VOCAB))
    rest = mix(len(answer), *answer[-1:]) % 7 if len(answer) < int(grammar) else 7
    return [token for token in range(VOCAB) if token % 7 == rest and token not in (EOS, POISON)]


def mask_of(token_ids: Sequence[int]) -> bytes:
    """Return the mask of the tokens that may be sampled."""
    bits = np.zeros(VOCAB, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def pick(hidden: int, sampling: Sampling, position: int, mask: bytes | None = None) -> int:
    """Return the token at `position`."""
    token = mix(hidden, sampling.seed, int(sampling.temperature * 1000)) % VOCAB
    suppressed = sampling.eos_token_ids if position < sampling.eos_from else ()
    while token in (POISON, *suppressed) or (
        mask is not None and not mask[token // 8] >> token % 8 & 1
    ):
        token = (token + 1) % VOCAB
    return token


def token_logprobs(hidden: int, token: int, number: int) -> TokenLogprobs:
    """Return how likely `token` and the `number` likeliest tokens are; exact in 32 bits."""
    top = tuple(((mix(hidden) + i) % VOCAB, -(i + 1) / 8) for i in range(number))
    return TokenLogprobs(logprob=-(mix(hidden, token) % 64) / 8, top=top)


def reference(
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    choice: int = 0,
    default_max_new_tokens: int = 256,
    grammar: str = "",
    forms: Sequence[Quantize] = ("none",),
    encoder_layers: int = 0,
) -> list[int]:
    """Return the answer that one machine without faults gives.

    Args:
        forms: of the weights by which each token is computed; the last one is that of the rest.
        encoder_layers: of an encoder-decoder, which reads the prompt; 0: the model is none.
    """
    limit = params.max_new_tokens or default_max_new_tokens
    made = _generate(prompt, params, choice, limit, grammar, forms, encoder_layers)
    return [token for _, token in made]


def reference_logprobs(
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    choice: int = 0,
    grammar: str = "",
    forms: Sequence[Quantize] = ("none",),
    encoder_layers: int = 0,
) -> list[TokenLogprobs]:
    """Return what goes with these tokens; needs `logprobs` and `max_new_tokens`."""
    assert params.logprobs is not None
    assert params.max_new_tokens is not None
    limit = params.max_new_tokens
    answer = _generate(prompt, params, choice, limit, grammar, forms, encoder_layers)
    return [token_logprobs(hidden, token, params.logprobs) for hidden, token in answer]


def _generate(
    prompt: Sequence[int],
    params: SamplingParams,
    choice: int,
    limit: int,
    grammar: str,
    forms: Sequence[Quantize],
    encoder_layers: int,
) -> Iterator[tuple[int, int]]:
    """Yield what each token of the answer was picked from, and the token."""
    passes: dict[Quantize, Pass] = {form: Pass(form) for form in forms}
    if encoder_layers:
        passes = {form: SourcePass(form, prompt, encoder_layers) for form in forms}
        prompt = DECODER_START
    answer: list[int] = []
    ends = () if params.ignore_eos else (EOS,)
    sampling = Sampling(
        temperature=params.temperature or 0.0,
        seed=choice + (DRAWN_SEED if params.seed is None else params.seed),
        eos_token_ids=ends,
        eos_from=len(prompt) + (params.min_new_tokens or 0),
    )
    for at in range(len(prompt), len(prompt) + limit):
        may_follow = admitted(grammar, answer)
        if not may_follow:
            return
        form = forms[min(len(answer), len(forms) - 1)]
        hidden = passes[form].hidden([*prompt, *answer])
        token = pick(hidden, sampling, at, mask_of(may_follow))
        answer.append(token)
        yield hidden, token
        if token in ends:
            return


class Pass:
    """One machine that has all layers, with weights of one form."""

    def __init__(self, form: Quantize) -> None:
        self._tint = _TINTS[form]
        self._states = [0] * NUM_LAYERS
        self._hidden = self._count = 0

    def hidden(self, token_ids: Sequence[int]) -> int:
        """Return the last hidden state of these tokens, which begin with those of the last call."""
        for position in range(self._count, len(token_ids)):
            self._hidden = mix(token_ids[position], position)
            for layer in range(NUM_LAYERS):
                state = mix(self._states[layer], self._hidden, layer + self._tint)
                self._hidden = self._states[layer] = state
        self._count = len(token_ids)
        return self._hidden


class SourcePass(Pass):
    """One machine that has all layers of an encoder-decoder, and has read a source."""

    def __init__(self, form: Quantize, source: Sequence[int], encoder_layers: int) -> None:
        super().__init__(form)
        self._first = encoder_layers
        rows = [mix(token, position) for position, token in enumerate(source)]
        for layer in range(encoder_layers):
            rows = encoded(rows, layer + self._tint)
        for row in rows:
            for layer in range(encoder_layers, NUM_LAYERS):
                self._states[layer] = mix(self._states[layer], row, layer + self._tint)

    def hidden(self, token_ids: Sequence[int]) -> int:
        """Return the last hidden state of an answer, its start tokens included."""
        for position in range(self._count, len(token_ids)):
            self._hidden = mix(token_ids[position], position)
            for layer in range(self._first, NUM_LAYERS):
                state = mix(self._states[layer], self._hidden, layer + self._tint)
                self._hidden = self._states[layer] = state
        self._count = len(token_ids)
        return self._hidden


def encoded(rows: Sequence[int], layer: int) -> list[int]:
    """Return what an encoder's layer makes of a source, each token of which sees all others."""
    whole = mix(*rows, layer)
    return [mix(row, whole) for row in rows]


def reference_embedding(prompt: Sequence[int], form: Quantize = "none") -> list[float]:
    """Return the mean of the last hidden states that one machine without faults gives."""
    machine = Pass(form)
    rows = [
        [NUM_LAYERS, position, token, machine.hidden(prompt[: position + 1])]
        for position, token in enumerate(prompt)
    ]
    return [float(np.float32(value / len(rows))) for value in _sum(rows)]


def _sum(rows: Sequence[Sequence[int]]) -> list[float]:
    """Return the sum of last hidden states, which is exact in 32 bits."""
    return [float(sum(row[column] & 0xFFF for row in rows)) for column in range(HIDDEN)]


class Missing(StageError):
    """A stage lacks positions."""

    def __init__(self, missing: tuple[MissingPositions, ...]) -> None:
        super().__init__("positions are missing")
        self.missing = missing


class Void(Exception):
    """The task names a sequence that was released."""


@dataclass(eq=False)
class Buffer:
    """Memory for the positions of one sequence, which owns it; others read it up to somewhere."""

    start: int
    owner: int
    readers: dict[int, int] = field(default_factory=dict)
    length: int = 0
    unseen: int = 0  # first blocks that layers with a window have dropped


@dataclass
class FakeSequence:
    """Token and state of each layer by position, how to sample, and the buffers behind it.

    Attributes:
        latest: positions after which it was computed last, and `before` that: where a stage that
            keeps states can go on, beside `snapshots`.
        kept_states: what it goes on from there, by layer.
    """

    states: list[list[int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    sampling: Sampling | None = None
    buffers: list[Buffer] = field(default_factory=list)
    seen_from: int = 0
    latest: int = 0
    before: int = 0
    snapshots: set[int] = field(default_factory=set)
    kept_states: dict[int, list[int]] = field(default_factory=dict)

    @property
    def kept(self) -> set[int]:
        """Positions after which states are kept."""
        return {0, self.latest, self.before, *self.snapshots}


class FakeStage:
    """Layers [start, stop) and the KV cache of all sequences.

    Args:
        kv_tokens: positions that it has room for.
        state_tokens: positions that a state takes as much room as; 0: its layers keep none.
        encoder_layers: of the whole model; they keep nothing.

    Attributes:
        num_computed: tokens that it computed.
    """

    def __init__(
        self, order: LoadStage, kv_tokens: int, state_tokens: int = 0, encoder_layers: int = 0
    ) -> None:
        self.layers = order.layers
        self.encoder_layers = encoder_layers
        self._tint = _TINTS[order.quantize]
        self.kv: dict[int, FakeSequence] = {}
        self.num_computed = 0
        self._kv_tokens = kv_tokens
        self._state_tokens = state_tokens
        self._came: set[int] = set()  # steps
        self._full_without: list[set[int]] = []  # of tasks for which memory ran out, those skipped
        self._released: set[int] = set()

    def release(self, sequence_id: int) -> None:
        """Free a sequence."""
        held = self.kv.pop(sequence_id, None)
        self._let_go(sequence_id, held.buffers if held else [])
        self._drop_unseen(held.buffers if held else [])
        self._released.add(sequence_id)

    def run(
        self, task: Task, frames: tuple[Frame, ...]
    ) -> tuple[tuple[TensorSpec, ...], tuple[Frame, ...]]:
        """Return the answer to a task; same arguments, same answer.

        Where memory runs out a real stage fails the task. That must not happen, unless what an
        earlier step was to free never came here: then this one is void, or will be in a moment.
        That sources were only overtaken, and come later, is no excuse.
        """
        skipped = {*range(task.oldest, task.step)} - self._came
        self._came.add(task.step)
        is_source = self._is_source(task)
        for lacking in self._full_without if is_source else ():
            lacking.discard(task.step)
        assert all(self._full_without), "out of memory, for a step has overtaken sources"
        for sequence_id in task.released:
            self.release(sequence_id)
        for told in task.seen_from:
            if (seen := self.kv.get(told.sequence_id)) is not None:
                seen.seen_from = max(seen.seen_from, told.position)
                self._drop_unseen(seen.buffers)
        if any(part.sequence_id in self._released for part in task.sequences):
            raise Void
        masks = _masks(task, frames)
        frames = frames[: len(frames) - bool(masks)]
        token_ids = token_ids_of_frame(frames[0])
        assert len(token_ids) == sum(part.num_tokens for part in task.sequences)
        assert len({part.sequence_id for part in task.sequences}) == len(task.sequences)
        rows = self._rows(task, token_ids, frames)
        missing = tuple(
            MissingPositions(sequence_id=part.sequence_id, have=have)
            for part in task.sequences
            if (have := self._have(part)) < part.start or self._cannot_sample(part)
        )
        if missing:
            raise Missing(missing)
        if POISON in token_ids:
            raise StageError("poison")
        sampled, row = list[tuple[int, Sampling, int]](), 0
        sums: list[list[float]] = []
        for part in task.sequences:
            self._run_slice(part, rows[row : row + part.num_tokens])
            row += part.num_tokens
            if part.embed:
                assert not part.sample
                sums.append(_sum(rows[row - part.num_tokens : row]))
            if part.sample:
                sampling = self.kv[part.sequence_id].sampling
                assert sampling is not None
                mask = masks.pop(0) if part.masked else None
                at = part.start + part.num_tokens - part.source
                token = pick(rows[row - 1][3], sampling, at, mask)
                sampled.append((rows[row - 1][3], sampling, token))
        self.num_computed += row
        if is_source and not self._keeps:
            for part in task.sequences:
                del self.kv[part.sequence_id]
        if self.memory_tokens > self._kv_tokens:
            assert skipped, "out of memory"
            self._full_without += [skipped] if self.encoder_layers and not is_source else []
        if self.layers.stop < NUM_LAYERS:
            array = np.asarray(rows, dtype="<i4")
            return (TensorSpec("int32", (len(rows), HIDDEN)),), (array.tobytes(),)
        specs, answer = _answer(sampled) if sampled else ((), ())
        if sums:
            specs += (TensorSpec("float32", (len(sums), HIDDEN)),)
            answer += (np.asarray(sums, dtype="<f4").tobytes(),)
        return specs, answer

    @property
    def keeps_states(self) -> bool:
        """Whether its layers keep states, from which alone it goes on."""
        return self._state_tokens > 0

    @property
    def memory_tokens(self) -> float:
        """Positions in all layers that take as much as a real stage would have allocated."""
        buffers = {buffer: None for held in self.kv.values() for buffer in held.buffers}
        windowed = windowed_layers(self.layers)
        states = sum(2 + len(held.snapshots) for held in self.kv.values())
        return self._state_tokens * states + KV_BLOCK * sum(
            -(-buffer.length // KV_BLOCK) - buffer.unseen * windowed / len(self.layers)
            for buffer in buffers
        )

    def _drop_unseen(self, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            seen = [held.seen_from for held in self.kv.values() if buffer in held.buffers]
            if seen:
                unseen = max(0, min(seen) - buffer.start) // KV_BLOCK
                buffer.unseen = max(buffer.unseen, min(unseen, -(-buffer.length // KV_BLOCK)))

    def _have(self, part: SequenceSlice) -> int:
        held = self.kv.get(part.sequence_id)
        if held is not None:
            if not self._state_tokens or part.start > len(held.states):
                return len(held.states)
            assert part.start in held.kept, "no state is kept where the step begins"
            return part.start
        if part.prefix is None:
            return 0
        parent = self.kv.get(part.prefix.sequence_id)
        if not parent or len(parent.states) < part.prefix.length:
            return 0
        assert not self._state_tokens or part.start in parent.kept, "no state is kept to go on from"
        return part.start

    def _cannot_sample(self, part: SequenceSlice) -> bool:
        held = self.kv.get(part.sequence_id)
        known = part.sampling or (held and held.sampling)
        return part.sample and known is None

    @property
    def _keeps(self) -> bool:
        """Whether any of its layers keeps something."""
        return self.layers.stop > self.encoder_layers

    def _is_source(self, task: Task) -> bool:
        """Return whether a task is of sources; it is all of them, or none, and each is whole."""
        assert all(bool(part.source) == bool(self.encoder_layers) for part in task.sequences)
        sources = [part for part in task.sequences if part.is_source]
        assert not sources or len(sources) == len(task.sequences), "sources and answers in a step"
        assert not any(part.embed and self.encoder_layers for part in task.sequences)
        for part in sources:
            assert (part.start, part.num_tokens) == (0, part.source), "a part of a source"
            assert not part.sample
            assert part.prefix is None
        assert sources or self._keeps, "a stage of an encoder got an answer to compute"
        return bool(sources)

    def _rows(self, task: Task, ids: list[int], frames: tuple[Frame, ...]) -> list[list[int]]:
        """Return [layers passed, position, token, hidden] per token; nothing else may arrive."""
        positions = [part.start + i for part in task.sequences for i in range(part.num_tokens)]
        begins_at = 0 if task.sequences[0].is_source else self.encoder_layers
        if self.layers.start <= begins_at < self.layers.stop:
            assert len(frames) == 1, "the first stage was given hidden states"
            sources = [
                0 if part.is_source else part.source
                for part in task.sequences
                for _ in range(part.num_tokens)
            ]
            return [
                [begins_at, position, token, mix(token, position - source)]
                for position, token, source in zip(positions, ids, sources, strict=True)
            ]
        array = np.frombuffer(frames[1], dtype="<i4").reshape(len(ids), HIDDEN)
        rows = [[int(x) for x in row] for row in array]
        for row, position, token in zip(rows, positions, ids, strict=True):
            assert row[:3] == [self.layers.start, position, token], "not what this stage computes"
        return rows

    def _begin(self, part: SequenceSlice) -> FakeSequence:
        held = self.kv.get(part.sequence_id)
        if held is None:
            held = self.kv[part.sequence_id] = FakeSequence()
            if part.prefix:
                parent = self.kv[part.prefix.sequence_id]
                held.states = parent.states[: part.prefix.length]
                held.tokens = parent.tokens[: part.prefix.length]
                held.seen_from = parent.seen_from
                held.latest = held.before = part.prefix.length
                if self._state_tokens:
                    held.snapshots = {part.prefix.length}
                    held.kept_states = {part.prefix.length: parent.kept_states[part.prefix.length]}
                self._share(part.sequence_id, part.prefix)
        held.sampling = part.sampling or held.sampling
        return held

    def _run_slice(self, part: SequenceSlice, rows: list[list[int]]) -> None:
        held = self._begin(part)
        assert held.seen_from <= max(0, part.start + 1 - WINDOW), "it sees what was dropped"
        del held.states[part.start :]
        del held.tokens[part.start :]
        if part.is_source:
            self._encode(rows)
        begun = [held.kept_states[part.start]] if self._state_tokens and part.start else []
        for row in rows:
            before = [[0] * len(self.layers), *held.states[-1:], *begun].pop()
            begun.clear()
            states = []
            for layer, state in zip(
                range(self.layers.start, self.layers.stop), before, strict=True
            ):
                if layer < self.encoder_layers:
                    states.append(0)
                    continue
                states.append(mix(state, row[3], layer + self._tint))
                row[3] = row[3] if part.is_source else states[-1]
            row[0] = self.layers.stop
            held.states.append(states)
            held.tokens.append(row[2])
        held.before, held.latest = part.start, len(held.states)
        held.snapshots = {at for at in held.snapshots if at <= part.start}
        if part.snapshot:
            assert self._state_tokens, "there is nothing to keep"
            held.snapshots.add(held.latest)
        if self._state_tokens:
            held.kept_states[held.latest] = held.states[-1]
            held.kept_states = {at: held.kept_states[at] for at in held.kept if at}
        self._allocate(part.sequence_id, part.start)

    def _encode(self, rows: list[list[int]]) -> None:
        for layer in range(self.layers.start, min(self.layers.stop, self.encoder_layers)):
            for row, value in zip(
                rows, encoded([row[3] for row in rows], layer + self._tint), strict=True
            ):
                row[3] = value

    def _share(self, sequence_id: int, prefix: SharedPrefix) -> None:
        parent, held = self.kv[prefix.sequence_id], self.kv[sequence_id]
        stop = prefix.length
        for buffer in reversed(parent.buffers):
            if buffer.start < prefix.length:
                held.buffers.insert(0, buffer)
                if prefix.take and buffer.owner == prefix.sequence_id:
                    buffer.owner = sequence_id
                else:
                    buffer.readers[sequence_id] = stop
            stop = min(stop, buffer.start)
        if prefix.take:
            self.release(prefix.sequence_id)

    def _allocate(self, sequence_id: int, start: int) -> None:
        """Write in the last buffer, if it is the sequence's and others read nothing there."""
        held = self.kv[sequence_id]
        chain = [b for b in held.buffers if b.start <= start]
        last = chain[-1] if chain else None
        if not last or last.owner != sequence_id or max(last.readers.values(), default=0) > start:
            last = Buffer(start, sequence_id)
            chain = [*(b for b in chain if b.start < start), last]
        self._let_go(sequence_id, [b for b in held.buffers if b not in chain])
        last.length = max(last.length, len(held.states) - last.start)
        held.buffers = chain

    def _let_go(self, sequence_id: int, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            buffer.readers.pop(sequence_id, None)


def _masks(task: Task, frames: tuple[Frame, ...]) -> list[bytes]:
    assert all(part.sample for part in task.sequences if part.masked)
    if not task.num_masks:
        return []
    count, width = task.tensors[-1].shape
    assert (count, task.tensors[-1].dtype) == (task.num_masks, "uint8")
    data = bytes(frames[-1])
    return [data[at : at + width] for at in range(0, len(data), width)]


def _answer(
    sampled: Sequence[tuple[int, Sampling, int]],
) -> tuple[tuple[TensorSpec, ...], tuple[Frame, ...]]:
    """Return what the last stage answers; log-probabilities too if any asked for them."""
    ids = frame_of_token_ids([token for _, _, token in sampled])
    asked = [sampling.logprobs for _, sampling, _ in sampled if sampling.logprobs is not None]
    if not asked:
        return (ids[0],), (ids[1],)
    found = [token_logprobs(hidden, token, max(asked)) for hidden, _, token in sampled]
    values = [[one.logprob, *(value for _, value in one.top)] for one in found]
    tokens = [
        [token, *(other for other, _ in one.top)]
        for (_, _, token), one in zip(sampled, found, strict=True)
    ]
    shape = (len(sampled), 1 + max(asked))
    return (
        (ids[0], TensorSpec("float32", shape), TensorSpec("int32", shape)),
        (
            ids[1],
            np.asarray(values, dtype="<f4").tobytes(),
            np.asarray(tokens, dtype="<i4").tobytes(),
        ),
    )
