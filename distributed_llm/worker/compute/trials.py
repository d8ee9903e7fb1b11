"""Times a new stage with steps of several sizes, before it serves.

The tasks of a running cluster are often all of one size. To predict plans whose steps would be
larger or smaller, the coordinator needs the times of other sizes too.
"""

from collections.abc import Callable

from distributed_llm.common.messages import SequenceSlice, StageTime, StageTrial
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import KV_BLOCK, SequenceId
from distributed_llm.worker.model.stage import Stage

_SEQUENCES = (1, 4, 16, 64)
"""Numbers of sequences to time a decoding step with, in this order."""

_PROMPT_TOKENS = 8
"""Positions of each of these sequences before the decoding step."""

_ROUNDS = 3
"""How often a step is run; the median of its times counts."""

_BUDGET_S = 1.0
"""Time for all trials, seconds; a step that might take longer than what is left is not run."""

_GREEDY = Sampling()

Timer = Callable[[Callable[[], object]], StageTime]
"""Runs a step as a task is run, and returns the time it took."""


def try_out(
    stage: Stage, timer: Timer, *, kv_tokens: int, context_length: int = 0
) -> tuple[StageTrial, ...]:
    """Return the times of decoding with more and more sequences, and of longer and longer prompts.

    The prompts of an encoder-decoder are sources. Only stages with encoder layers are timed with
    them, and only those with decoder layers with decoding.

    Takes at most about a second, unless a single token takes longer.

    Args:
        stage: without sequences; has none afterwards either.
        timer: runs and times a step.
        kv_tokens: positions that the KV cache has room for.
        context_length: of an encoder-decoder, tokens of the longest source, for a table of its
            positions may end there; 0: any number.
    """
    trials = _Trials(stage, timer, context_length if stage.inputs.encoder_layers else 0)
    try:
        for sequences in _SEQUENCES:
            if sequences * KV_BLOCK > kv_tokens or not trials.run(sequences):
                break
    finally:
        stage.reset()
    return tuple(trials.done)


class _Trials:
    def __init__(self, stage: Stage, timer: Timer, longest: int) -> None:
        self._stage = stage
        self._timer = timer
        self._longest = longest
        layers, encoder_layers = stage.inputs.layers, stage.inputs.encoder_layers
        self._has_sources = encoder_layers > 0
        self._reads = not self._has_sources or layers.start < encoder_layers
        self._decodes = layers.stop > encoder_layers
        self._left_s = _BUDGET_S
        self._token_s = 0.0  # per token, at most, in steps larger than those that were run
        self.done: list[StageTrial] = []

    def run(self, sequences: int) -> bool:
        """Time three steps of one size.

        They are: decoding of so many sequences; reading one prompt as long as all of these
        together; and decoding one token after that prompt.

        Returns:
            Whether there was time for them and such a prompt may be; if not, nothing was run.
        """
        tokens = sequences * _PROMPT_TOKENS
        if self._longest and tokens > self._longest:
            return False
        if tokens * self._token_s > self._left_s:
            return False
        prepared = self._timed(self._prompts(sequences, _PROMPT_TOKENS))
        self._token_s = prepared.compute_us / 1e6 / tokens
        if self._decodes:
            self._add(self._decoding(sequences, _PROMPT_TOKENS))
        self._stage.reset()
        if self._reads:
            self._add(self._prompts(1, tokens))
        else:
            self._timed(self._prompts(1, tokens))  # what decoding sees
        if self._decodes:
            self._add(self._decoding(1, tokens))
        self._stage.reset()
        return True

    def _prompts(self, sequences: int, length: int) -> list[SequenceSlice]:
        """Return a step that reads prompts of this length."""
        source = length if self._has_sources else 0
        return _step(sequences, start=0, num_tokens=length, source=source)

    def _decoding(self, sequences: int, length: int) -> list[SequenceSlice]:
        """Return a step that decodes one token after prompts of this length."""
        source = length if self._has_sources else 0
        return _step(sequences, start=length, num_tokens=1, source=source)

    def _add(self, step: list[SequenceSlice]) -> None:
        """Run a step up to `_ROUNDS` times and add the median time."""
        rounds = [self._timed(step)]
        while len(rounds) < _ROUNDS and self._left_s > 0:
            rounds.append(self._timed(step))
        usual = sorted(rounds, key=lambda took: took.layers_us)[(len(rounds) - 1) // 2]
        self.done.append(
            StageTrial(
                sequences=len(step),
                start=step[0].start,
                num_tokens=step[0].num_tokens,
                time=usual,
                is_source=step[0].is_source,
            )
        )

    def _timed(self, step: list[SequenceSlice]) -> StageTime:
        total = sum(part.num_tokens for part in step)
        is_source = step[0].is_source
        token_ids, hidden_states = self._stage.inputs.made_up(total, source=is_source)
        took = self._timer(lambda: self._stage.run(step, token_ids, hidden_states))
        self._left_s -= took.compute_us / 1e6
        return took


def _step(sequences: int, *, start: int, num_tokens: int, source: int) -> list[SequenceSlice]:
    return [
        SequenceSlice(
            sequence_id=SequenceId(number),
            start=start,
            num_tokens=num_tokens,
            sample=start >= source,
            sampling=_GREEDY if start == source else None,
            source=source,
        )
        for number in range(sequences)
    ]
