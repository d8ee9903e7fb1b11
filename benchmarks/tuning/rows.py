"""The table of all configurations, as texts."""

from benchmarks.tuning.figures import LoadFigures, Outcome

HEAD = (
    "at once",
    "tokens/s",
    "spread",
    "first token, ms",
    "between tokens, ms: p50",
    "p99",
    "outside the stages",
    "bytes per token",
    "busiest worker",
)


def rows_of(outcome: Outcome) -> list[tuple[str, ...]]:
    """Return a row for each load of a configuration that did not fail."""
    several = len(outcome.runs) > 1
    return [
        _row(count, figures, f"{outcome.spread(count):.0%}" if several else "-")
        for count, figures in outcome.loads.items()
    ]


def _row(count: int, figures: LoadFigures, spread: str) -> tuple[str, ...]:
    busiest = figures.busiest
    outside, wire = figures.outside_share, figures.wire_bytes_per_token
    return (
        str(count),
        number(figures.tokens_per_s),
        spread,
        number(1000 * figures.first_token_s),
        number(1000 * figures.gap_p50_s),
        number(1000 * figures.gap_p99_s),
        "-" if outside is None else f"{outside:.0%}",
        "-" if wire is None else number(wire),
        f"{busiest[0]} {busiest[1]:.0%}" if busiest else "-",
    )


def stages_text(outcome: Outcome) -> str:
    """Return who serves what."""
    stages = outcome.runs[-1].stages if outcome.runs else ()
    return " ".join(f"{worker} {held}" for worker, held in stages)


def number(value: float) -> str:
    """Return three digits, or all before the point."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
