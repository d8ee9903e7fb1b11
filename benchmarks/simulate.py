"""Simulate a cluster of any size: how busy, quick and fair it is, and what the coordinator costs.

    python -m benchmarks.simulate --workers 1000 --pipelines 125 --requests 10000
    python -m benchmarks.simulate --table

The core is the production one, and so are the agents of the workers; time is virtual (see
`virtual_cluster`). Only what the coordinator takes is real: the CPU time of its decisions, without
sockets, messages' encoding and text.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.scenario import Scenario
from benchmarks.virtual_cluster import Meter, VirtualCluster

_TABLE_WORKERS = (8, 80, 250, 1000)
_TABLE_RUNNING = (1, 8, 32, 64, 128, 256)
_STAGES = 8
_PER_PIPELINE = 80


@dataclass(frozen=True)
class Run:
    """A simulation that has ended.

    Attributes:
        joining: what the core took until all workers served, likewise `serving` from then on.
        served_s: virtual seconds from the first request to the end of the last.
        wall_s: real ones, of everything.
    """

    cluster: VirtualCluster
    joining: Meter
    serving: Meter
    served_s: float
    wall_s: float


def simulate(scenario: Scenario) -> Run:
    """Let all workers join and all requests end."""
    started = time.perf_counter()
    cluster = VirtualCluster(scenario)
    cluster.start()
    joining, cluster.meter = cluster.meter, Meter()
    cluster.ask()
    served_s = cluster.now - cluster.asked_at
    return Run(cluster, joining, cluster.meter, served_s, time.perf_counter() - started)


# ------------------------------------------------------------------ one scenario in full


def report(run: Run) -> str:
    """Return all figures of a run, for people."""
    return "\n\n".join((_service(run), _coordinator(run), _by_kind(run)))


def _service(run: Run) -> str:
    cluster, seen = run.cluster, run.cluster.seen
    ended = ", ".join(f"{count} {how}" for how, count in seen.ended.most_common())
    shares = [share for group in cluster.busy for share in group]
    slowest = [max(group) for group in cluster.busy]
    rows = [
        ("requests", ended),
        ("virtual seconds", f"{run.served_s:.1f}, all begun after {_drained_s(run):.1f}"),
        ("tokens/s of answers", f"{seen.tokens / run.served_s:.0f}"),
        ("pipelines, workers with layers", f"{len(cluster.busy)}, {len(shares)}"),
        ("busy share of a stage until all are begun, p10 p50 p90", _quantiles(shares, 1)),
        ("the same of the busiest stage of a pipeline", _quantiles(slowest, 1)),
        ("queued before the first step, s, p50 p99", _median_and_tail(seen.queued_s)),
        ("time to first token, s, p50 p99", _median_and_tail(seen.ttft_s)),
        ("between tokens, s, p50 p99", _median_and_tail(seen.gaps_s)),
        ("fairness among clients that wait (Jain), mean least", _fairness(seen.fairness)),
    ]
    if cluster.deaths:
        rows.append(("workers that died", str(cluster.deaths)))
    return _table(("served", ""), rows)


def _coordinator(run: Run) -> str:
    cluster, meter = run.cluster, run.serving
    events = sum(meter.count.values())
    totals = {
        "event": events,
        "step, all of its stages": cluster.steps,
        "task, a step on one stage": cluster.tasks,
        "token of an answer": cluster.seen.tokens,
    }
    rows = [(f"µs per {what}", _per(meter.total_s, count)) for what, count in totals.items()]
    rows += [
        ("CPU share of one core, if time were real", f"{meter.total_s / run.served_s:.2f}"),
        ("steps, of them relayed hops", f"{cluster.steps}, {cluster.relays}"),
        ("CPU seconds until all workers served", f"{run.joining.total_s:.2f}"),
        ("wall seconds of the simulation", f"{run.wall_s:.0f}"),
    ]
    return _table(("coordinator", ""), rows)


def _by_kind(run: Run) -> str:
    rows = []
    for what, meter in (("joining", run.joining), ("serving", run.serving)):
        for kind, seconds in sorted(meter.seconds.items(), key=lambda item: -item[1]):
            count = meter.count[kind]
            rows.append((what, kind, str(count), f"{seconds:.3f}", _per(seconds, count)))
    return _table(("while", "event", "count", "CPU s", "µs each"), rows)


def _drained_s(run: Run) -> float:
    return run.cluster.drained_at - run.cluster.asked_at


def _per(seconds: float, count: int) -> str:
    return f"{1e6 * seconds / count:.1f}" if count else "-"


def _at(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _quantiles(values: Sequence[float], scale: float) -> str:
    return " ".join(f"{scale * _at(values, share):.2f}" for share in (0.1, 0.5, 0.9))


def _median_and_tail(values: Sequence[float]) -> str:
    return f"{_at(values, 0.5):.3f} {_at(values, 0.99):.3f}" if values else "-"


def _fairness(values: Sequence[float]) -> str:
    if not values:
        return "- (fewer than two clients had requests waiting all the time)"
    return f"{sum(values) / len(values):.3f} {min(values):.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ------------------------------------------------------------------ how it grows


def growth(scenario: Scenario) -> str:
    """Return how the coordinator's time grows with workers, and with answers that run."""
    by_workers = [
        replace(
            scenario,
            workers=workers,
            pipelines=max(1, workers // _STAGES),
            requests=_PER_PIPELINE * max(1, workers // _STAGES),
        )
        for workers in _TABLE_WORKERS
    ]
    by_running = [
        replace(scenario, workers=_STAGES, pipelines=1, batch=running, requests=8 * running)
        for running in _TABLE_RUNNING
    ]
    return "\n\n".join(_growth(scenarios) for scenarios in (by_workers, by_running))


def _growth(scenarios: Sequence[Scenario]) -> str:
    head = (
        *("workers", "pipelines", "requests", "running in each", "answers per step"),
        *("µs per event", "µs per step", "µs per task", "µs per token", "CPU share"),
        *("CPU s until all serve", "wall s"),
    )
    return _table(head, [_growth_row(simulate(scenario)) for scenario in scenarios])


def _growth_row(run: Run) -> list[str]:
    cluster, total_s = run.cluster, run.serving.total_s
    scenario = cluster.scenario
    return [
        str(scenario.workers),
        str(scenario.pipelines),
        str(scenario.requests),
        str(min(scenario.batch, scenario.requests // scenario.pipelines)),
        f"{cluster.seen.tokens / cluster.steps:.1f}",
        _per(total_s, sum(run.serving.count.values())),
        _per(total_s, cluster.steps),
        _per(total_s, cluster.tasks),
        _per(total_s, cluster.seen.tokens),
        f"{total_s / run.served_s:.2f}",
        f"{run.joining.total_s:.2f}",
        f"{run.wall_s:.0f}",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--table", action="store_true", help="how the coordinator's time grows")
    for option in dataclasses.fields(Scenario):
        parser.add_argument(
            "--" + option.name.replace("_", "-"),
            type=type(option.default),
            default=option.default,
            help=f"{option.metadata['help']} (%(default)s)",
        )
    return parser


if __name__ == "__main__":
    arguments = vars(_parser().parse_args())
    table = arguments.pop("table")
    chosen = Scenario(**arguments)
    print(growth(chosen) if table else report(simulate(chosen)))
