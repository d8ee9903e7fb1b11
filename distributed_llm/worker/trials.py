"""What a new stage takes for steps of several sizes, tried before it serves.

Tasks of a cluster at work are often all of one size, and tell little of other sizes. What a plan
would do, whose steps are larger or smaller than those of now, follows from these trials.
"""

from collections.abc import Callable

from distributed_llm.common.messages import SequenceSlice, StageTime, StageTrial
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import KV_BLOCK
from distributed_llm.worker.stage import Stage

_SEQUENCES = (1, 4, 16, 64)
_PROMPT_TOKENS = 8
_ROUNDS = 3
_GREEDY = Sampling()

_BUDGET_S = 1.0
"""For all of them; what might take longer than the rest of it is not tried."""

Timed = Callable[[Callable[[], object]], StageTime]


def try_out(stage: Stage, timed: Timed, *, kv_tokens: int) -> tuple[StageTrial, ...]:
    """Return what prompts and decoding take for more and more sequences; takes about a second.

    Args:
        stage: that no sequence is on; none is afterwards.
        timed: does what it is given, as a task is done, and returns what that took.
        kv_tokens: positions that the KV cache has room for.
    """
    trials = _Trials(stage, timed)
    try:
        for sequences in _SEQUENCES:
            if sequences * KV_BLOCK > kv_tokens:
                break
            if not trials.add(sequences, 0, _PROMPT_TOKENS):
                break
            if not trials.add(sequences, _PROMPT_TOKENS, 1):
                break
    finally:
        stage.reset()
    return tuple(trials.found)


class _Trials:
    def __init__(self, stage: Stage, timed: Timed) -> None:
        self._stage = stage
        self._timed = timed
        self._left_s = _BUDGET_S
        self.found: list[StageTrial] = []

    def add(self, sequences: int, start: int, num_tokens: int) -> bool:
        """Try a step of so many sequences, unless it might take too long."""
        total = sequences * num_tokens
        if self._most_s(total) > self._left_s:
            return False
        token_ids, hidden_states = self._stage.inputs.made_up(total)
        step = _step(sequences, start, num_tokens)
        rounds: list[StageTime] = []
        while len(rounds) < _ROUNDS and (not rounds or self._left_s > 0):
            rounds.append(self._timed(lambda: self._stage.run(step, token_ids, hidden_states)))
            self._left_s -= rounds[-1].compute_us / 1e6
        usual = sorted(rounds, key=lambda took: took.layers_us)[(len(rounds) - 1) // 2]
        self.found.append(
            StageTrial(sequences=sequences, start=start, num_tokens=num_tokens, time=usual)
        )
        return True

    def _most_s(self, tokens: int) -> float:
        """Return the most that a step should take: no more per token than the last one."""
        if not self.found:
            return 0.0
        last = self.found[-1]
        grows = tokens / (last.sequences * last.num_tokens)
        return last.time.compute_us / 1e6 * max(1.0, grows)


def _step(sequences: int, start: int, num_tokens: int) -> list[SequenceSlice]:
    return [
        SequenceSlice(
            sequence_id=number,
            start=start,
            num_tokens=num_tokens,
            sample=True,
            sampling=None if start else _GREEDY,
        )
        for number in range(sequences)
    ]
