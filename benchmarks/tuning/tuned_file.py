"""The file of settings that the tuning ends with."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tuning.provenance import Provenance
from benchmarks.tuning.recommendation import Pick

NAME = "tuned.yaml"
_WIDTH = 98


def tuned_text(
    chosen: Pick,
    others: Sequence[Pick],
    provenance: Provenance,
    extra: Mapping[str, Any],
    *,
    simulated: bool = False,
) -> str:
    """Return the file: what differs from the defaults, and why.

    Args:
        chosen: the configuration that it sets.
        others: the best for other goals, for comments.
        extra: settings that are not tuned but belong to it, such as the model.
    """
    picked = chosen.outcome.configuration
    lines = [
        "# Settings of a coordinator that benchmark.py chose by "
        + ("simulating machines: predicted, not measured." if simulated else "measuring."),
        f"# Start it with: dllm coordinator --config {NAME}",
        *_comment(f"Chosen for {_goal(chosen)}: {chosen.why}"),
    ]
    for other in others:
        title = other.outcome.configuration.title
        lines += _comment(f"Best for {_goal(other)}: {title}. {other.why}")
    lines.append("#")
    for line in provenance.lines:
        lines += _comment(line)
    settings = {**extra, **picked.changes}
    if picked.layers:
        settings["min_workers"] = len(picked.layers)
    if not settings:
        return "\n".join([*lines, "# The defaults are best: nothing is set here.", ""])
    if picked.layers:
        lines += _comment("Layers go to workers by name: start each with dllm worker --name NAME.")
    lines += ["", "coordinator:"]
    for name, value in settings.items():
        if isinstance(value, Mapping):
            lines.append(f"  {name}:")
            lines += [f"    {json.dumps(key)}: {json.dumps(held)}" for key, held in value.items()]
        else:
            lines.append(f"  {name}: {json.dumps(value)}")
    return "\n".join([*lines, ""])


def write_keeping(path: Path, text: str) -> Path | None:
    """Write a file; return where the one that it replaces went, None if there was none.

    A file that says the same stays as it is.
    """
    kept = None
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
        kept = path.with_name(path.name + ".bak")
        path.replace(kept)
    path.write_text(text, encoding="utf-8")
    return kept


def _goal(pick: Pick) -> str:
    return "latency and throughput" if pick.goal == "both" else pick.goal


def _comment(text: str) -> list[str]:
    """Return lines of comments; what could end a comment is taken out."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    lines, line = [], ""
    for word in clean.split():
        if line and len(line) + len(word) + 1 > _WIDTH:
            lines.append(f"# {line}")
            line = ""
        line = f"{line} {word}".strip()
    return [*lines, f"# {line}"]
