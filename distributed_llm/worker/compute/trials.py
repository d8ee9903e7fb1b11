"""What a new stage takes for steps of several sizes, tried before it serves.

Tasks of a cluster at work are often all of one size, and tell little of other sizes. What a plan
would do, whose steps are larger or smaller than those of now, follows from these trials.
"""

from collections.abc import Callable

from distributed_llm.common.messages import SequenceSlice, StageTime, StageTrial
from distributed_llm.common.sampling_params import Sampling
from distributed_llm.common.types import KV_BLOCK
from distributed_llm.worker.model.stage import Stage

_SEQUENCES = (1, 4, 16, 64)
_PROMPT_TOKENS = 8
_ROUNDS = 3
_GREEDY = Sampling()

_BUDGET_S = 1.0
"""For all of them; what might take longer than the rest of it is not tried."""

Timed = Callable[[Callable[[], object]], StageTime]


def try_out(stage: Stage, timed: Timed, *, kv_tokens: int) -> tuple[StageTrial, ...]:
    """Return what decoding takes for more and more sequences, and longer and longer prompts.

    It takes about a second, more only where a single token does.

    Args:
        stage: that no sequence is on; none is afterwards.
        timed: does what it is given, as a task is done, and returns what that took.
        kv_tokens: positions that the KV cache has room for.
    """
    trials = _Trials(stage, timed)
    try:
        for sequences in _SEQUENCES:
            if sequences * KV_BLOCK > kv_tokens or not trials.try_out(sequences):
                break
    finally:
        stage.reset()
    return tuple(trials.found)


class _Trials:
    def __init__(self, stage: Stage, timed: Timed) -> None:
        self._stage = stage
        self._timed = timed
        self._left_s = _BUDGET_S
        self._token_s = 0.0  # at most, in a larger step than those before
        self.found: list[StageTrial] = []

    def try_out(self, sequences: int) -> bool:
        """Try so many that decode, a prompt of as many tokens as they had, and its answer.

        Returns:
            Whether there was time.
        """
        tokens = sequences * _PROMPT_TOKENS
        if tokens * self._token_s > self._left_s:
            return False
        prepared = self._run(_step(sequences, 0, _PROMPT_TOKENS))
        self._token_s = prepared.compute_us / 1e6 / tokens
        self._add(sequences, _PROMPT_TOKENS, 1)
        self._stage.reset()
        self._add(1, 0, tokens)
        self._add(1, tokens, 1)
        self._stage.reset()
        return True

    def _add(self, sequences: int, start: int, num_tokens: int) -> None:
        """Do a step some times, once at least; its median counts."""
        step = _step(sequences, start, num_tokens)
        rounds = [self._run(step)]
        while len(rounds) < _ROUNDS and self._left_s > 0:
            rounds.append(self._run(step))
        usual = sorted(rounds, key=lambda took: took.layers_us)[(len(rounds) - 1) // 2]
        self.found.append(
            StageTrial(sequences=sequences, start=start, num_tokens=num_tokens, time=usual)
        )

    def _run(self, step: list[SequenceSlice]) -> StageTime:
        total = sum(part.num_tokens for part in step)
        token_ids, hidden_states = self._stage.inputs.made_up(total)
        took = self._timed(lambda: self._stage.run(step, token_ids, hidden_states))
        self._left_s -= took.compute_us / 1e6
        return took


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
