"""The report: one HTML file with everything in it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from benchmarks.tuning import plots
from benchmarks.tuning.configurations import Configuration
from benchmarks.tuning.figures import Outcome
from benchmarks.tuning.provenance import Provenance
from benchmarks.tuning.recommendation import Pick
from benchmarks.tuning.rows import HEAD, rows_of, stages_text

NAME = "tuned.html"
_TEMPLATE = "report.html.j2"

Predictions = Mapping[Configuration, Mapping[int, float]]
"""Tokens/s by configuration and load."""


def report_html(
    outcomes: Sequence[Outcome],
    picks: Sequence[Pick],
    provenance: Provenance,
    *,
    settings: str,
    simulated: bool,
    left_out: Sequence[str] = (),
    predictions: Predictions | None = None,
) -> str:
    """Return the report; whatever people named is escaped.

    Args:
        outcomes: not all have failed.
        settings: the text of the file of settings.
        left_out: what was not tried, and why.
        predictions: of what was measured, if there are any.
    """
    sound = [one for one in outcomes if not one.failure]
    pairs = _pairs(sound, predictions or {})
    drawn = [
        ("Throughput", plots.throughput_plot(sound)),
        ("Time between tokens", plots.latency_plot(sound)),
        ("Time to the first token", plots.first_token_plot(sound)),
    ]
    if pairs:
        drawn.append(("Predicted and measured", plots.prediction_plot(pairs)))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(
        head=HEAD,
        groups=[(one.configuration.title, stages_text(one), rows_of(one)) for one in sound],
        failed=[(one.configuration.title, one.failure) for one in outcomes if one.failure],
        notes=[(one.configuration.title, one.note) for one in sound if one.note],
        picks=[(pick.goal, pick.outcome.configuration.title, pick.why) for pick in picks],
        plots=[(title, Markup(svg)) for title, svg in drawn],  # matplotlib escapes
        num_plotted=plots.MOST,
        provenance=provenance,
        settings=settings,
        simulated=simulated,
        left_out=left_out,
    )


def _pairs(outcomes: Sequence[Outcome], predictions: Predictions) -> list[tuple[float, float]]:
    return [
        (figures.tokens_per_s, predictions[one.configuration][count])
        for one in outcomes
        if one.configuration in predictions
        for count, figures in one.loads.items()
    ]
