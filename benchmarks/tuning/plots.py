"""The plots of the report, as SVG texts."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.tuning.figures import Outcome

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "dllm",
    "svg.fonttype": "path",
    "text.parse_math": False,  # names of workers are no formulas
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
MOST = 10
"""Configurations in one plot."""
_BAR = 0.8


def throughput_plot(outcomes: Sequence[Outcome]) -> str:
    """Return tokens/s over the requests at once, a line per configuration."""

    def draw(axes: Axes) -> None:
        for one in outcomes[:MOST]:
            loads = one.loads
            rates = [loads[n].tokens_per_s for n in loads]
            axes.plot(list(loads), rates, marker="o", label=one.configuration.title)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(outcomes[0].loads), [str(n) for n in outcomes[0].loads])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("requests at once")
        axes.set_ylabel("tokens/s of all answers")

    return _svg(draw, len(outcomes))


def latency_plot(outcomes: Sequence[Outcome]) -> str:
    """Return the time between tokens, p50 and p99, under each load; bars per configuration."""

    def draw(axes: Axes) -> None:
        loads = list(outcomes[0].loads)
        shown = outcomes[:MOST]
        width = _BAR / len(shown)
        for number, one in enumerate(shown):
            at = [i - _BAR / 2 + (number + 0.5) * width for i in range(len(loads))]
            p50 = [1000 * one.loads[n].gap_p50_s for n in loads]
            p99 = [1000 * one.loads[n].gap_p99_s for n in loads]
            bars = axes.bar(at, p50, width * 0.9, label=one.configuration.title)
            above = [max(0.0, high - low) for low, high in zip(p50, p99, strict=True)]
            none = [0.0] * len(p50)
            color = bars.patches[0].get_facecolor()
            axes.errorbar(at, p50, yerr=[none, above], fmt="none", ecolor=color, capsize=2)
        axes.set_xticks(range(len(loads)), [str(n) for n in loads])
        axes.set_xlabel("requests at once")
        axes.set_ylabel("ms between tokens: p50, whisker p99")

    return _svg(draw, len(outcomes))


def first_token_plot(outcomes: Sequence[Outcome]) -> str:
    """Return the time to the first token over the requests at once, a line per configuration."""

    def draw(axes: Axes) -> None:
        for one in outcomes[:MOST]:
            times = [1000 * figures.first_token_s for figures in one.loads.values()]
            axes.plot(list(one.loads), times, marker="o", label=one.configuration.title)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(outcomes[0].loads), [str(n) for n in outcomes[0].loads])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("requests at once")
        axes.set_ylabel("ms to the first token, median")

    return _svg(draw, len(outcomes))


def prediction_plot(pairs: Sequence[tuple[float, float]]) -> str:
    """Return predicted over measured tokens/s, a point for each configuration and load.

    Args:
        pairs: (measured, predicted).
    """

    def draw(axes: Axes) -> None:
        top = 1.1 * max(max(pair) for pair in pairs)
        axes.plot([0, top], [0, top], linestyle="--", color="grey", label="as predicted")
        axes.scatter([a for a, _ in pairs], [b for _, b in pairs])
        axes.set_xlabel("tokens/s, measured")
        axes.set_ylabel("tokens/s, predicted")

    return _svg(draw, 1)


def _svg(draw: Callable[[Axes], None], entries: int) -> str:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.0, 3.2 + 0.17 * min(entries, MOST)), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        figure.legend(loc="outside lower left", fontsize=8, frameon=False)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    return text[text.index("<svg") :]
