"""The depth of one pipeline: how many steps should be in flight. Pure.

Where every stage has a machine of its own, about as many as there are stages keep them all busy.
Where stages share a machine, more steps than machines would compute on the same cores, where they
take as long together as one after the other and make each other's threads wait; so no more are
begun, unless steps spend so long between the machines that these would have nothing to do.
`DepthEstimator` predicts which depth is best by measured times. Asking it costs more than
everything else about a step, so its predictions are kept until enough has changed.
"""

from distributed_llm.coordinator.serving.depth_estimator import DepthEstimator
from distributed_llm.coordinator.serving.steps import StepDone

_NEVER_MEASURED_S = 1e-9
"""Seconds per token of a pipeline that was not measured: so few that it gets answers to measure."""


class DepthPolicy:
    """The depth of one pipeline for steps that decode, and for prefill chunks.

    Args:
        num_stages: stages of the pipeline.
        num_machines: that these are on; at most as many.
        max_tokens: tokens in a full prefill chunk.
    """

    def __init__(self, num_stages: int, *, num_machines: int, max_tokens: int) -> None:
        self._num_stages = num_stages
        self._num_machines = num_machines
        self._max_tokens = max_tokens
        self._decodes = DepthEstimator(num_stages)
        self._prefills = DepthEstimator(num_stages)
        self._pace_s = _NEVER_MEASURED_S
        self._pace_is_current = False
        self._decode_depth = 0
        self._decode_depth_is_for = 0  # decoding answers when it was chosen
        self._decodes_since = 0  # steps observed since it was chosen
        self._prefill_depths: dict[int, int] = {}  # by decode depth; since the last prefill step

    @property
    def seconds_per_token(self) -> float:
        """Seconds of the slowest stage per decoded token; next to nothing before it is measured."""
        if not self._pace_is_current:
            stages = range(self._num_stages)
            times = (self._decodes.seconds_per_token(stage) for stage in stages)
            self._pace_s = max((seconds for seconds in times if seconds), default=self._pace_s)
            self._pace_is_current = True
        return self._pace_s

    def observe(self, done: StepDone, *, now: float) -> None:
        """Learn from a step how long the stages take."""
        if done.step.decodes:
            times, self._pace_is_current = self._decodes, False
            self._decodes_since += 1
        else:
            times, self._prefill_depths = self._prefills, {}
        tokens = len(done.step.token_ids)
        for stage in range(done.first):
            times.observe(stage, tokens, 0.0, depth=done.depth, now=now)
        for stage, timing in enumerate(done.timings, done.first):
            times.observe(stage, tokens, timing.compute_us / 1e6, depth=done.depth, now=now)
        inside_s = sum(timing.compute_us + timing.queued_us for timing in done.timings) / 1e6
        times.observe_overhead(max(0.0, done.round_trip_s - inside_s), now=now)

    def decode_depth(self, decoding: int, *, limit: int, now: float) -> int:
        """Return how many steps should decode at the same time.

        It is chosen anew after one round of steps, or when `decoding` has changed by an eighth.

        Args:
            decoding: answers that decode.
            limit: most steps that may be in flight.
        """
        since, was_for = self._decodes_since, self._decode_depth_is_for
        if since >= self._decode_depth or 8 * abs(decoding - was_for) > was_for:
            limit = min(self._useful(self._decodes, limit), max(1, decoding))
            self._decode_depth = self._decodes.best_depth(decoding, limit=limit, now=now)
            self._decode_depth_is_for, self._decodes_since = decoding, 0
        return min(self._decode_depth, decoding)

    def prefill_depth(self, decode_depth: int, *, limit: int, now: float) -> int:
        """Return how many steps with prefill chunks should be in flight.

        Decoding answers wait for chunks. While there are any, no more chunks are tried than steps
        that decode were seen not to slow each other down.

        Args:
            decode_depth: steps that should decode at the same time; 0 if no answer decodes.
            limit: most steps that may be in flight.
        """
        depth = self._prefill_depths.get(decode_depth)
        if depth is None:
            limit = self._useful(self._prefills, limit)
            depth = self._prefill_depths[decode_depth] = self._prefills.best_chunks(
                self._max_tokens,
                limit=limit,
                try_up_to=decode_depth or limit,
                frugal=decode_depth > 0,
                now=now,
            )
        return depth

    def _useful(self, times: DepthEstimator, limit: int) -> int:
        """Return how many steps at most have something to compute on, if stages share machines."""
        if self._num_machines == self._num_stages:
            return limit
        return min(limit, self._num_machines + int(self._num_machines * times.share_between))
