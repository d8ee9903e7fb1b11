"""When workers that joined are used. Pure.

A worker that joins is used, under strategy "speed", as soon as that is faster; under the others as
soon as no request is under way. Where a pipeline is missing, it is used at once.
"""

from distributed_llm.coordinator.cluster.cluster import Cluster
from distributed_llm.coordinator.cluster.moves import Moves
from distributed_llm.coordinator.cluster.replanning import Replanning
from distributed_llm.coordinator.events import Action


class Newcomers:
    """Has plans made with workers that joined, once they may serve.

    Args:
        cluster: that they joined.
        replanning: has plans made, and knows when the next one is due.
        moves: nothing is planned anew while one is under way.
    """

    def __init__(self, cluster: Cluster, replanning: Replanning, moves: Moves) -> None:
        self._cluster = cluster
        self._replanning = replanning
        self._moves = moves

    def next_deadline(self) -> float | None:
        """Return when `on_timer` is next due, clock seconds, or None."""
        return self._replanning.replan_at

    def on_timer(self, *, now: float) -> list[Action]:
        """Use workers that joined, once nobody else has for a while."""
        replan_at = self._replanning.replan_at
        return self._use() if replan_at is not None and replan_at <= now else []

    def settle(self) -> list[Action]:
        """Use workers that waited until no request is under way."""
        idle = not self._cluster.book.busy
        return self._use() if self._replanning.replan_when_idle and idle else []

    def _use(self) -> list[Action]:
        """Plan with workers that joined; under strategy "speed", `Rebalancing` does if it can."""
        replanning, pipelines = self._replanning, self._cluster.pipelines
        if self._cluster.settings.strategy == "speed" and pipelines.state != "waiting":
            return self._use_at_speed()
        if self._moves.move is not None:  # plan when it has ended
            replanning.replan_at, replanning.replan_when_idle = None, True
            return []
        if not self._cluster.book.busy:
            return replanning.plan_anew()
        waiting = replanning.tell_waiting()
        if pipelines.complete:
            replanning.replan_at, replanning.replan_when_idle = None, True
            return waiting
        return [*replanning.add_pipeline(), *waiting]

    def _use_at_speed(self) -> list[Action]:
        """Add a pipeline if one is missing, and see whether weights of more bits fit.

        The rebalancer does the rest.
        """
        replanning = self._replanning
        actions = [] if self._cluster.pipelines.complete else replanning.add_pipeline()
        replanning.replan_at, replanning.replan_when_idle = None, False
        if not replanning.may_have_more_bits:
            return actions
        if self._moves.move is not None:  # plan when it has ended
            replanning.replan_when_idle = True
            return actions
        return [*actions, *replanning.ask_for_more_bits()]
