"""What the tuning writes: settings that a coordinator takes, and a report that shows what is so."""

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks.tuning.configurations import Configuration
from benchmarks.tuning.figures import LoadFigures, Outcome, Run
from benchmarks.tuning.provenance import Provenance
from benchmarks.tuning.recommendation import Pick
from benchmarks.tuning.report import report_html
from benchmarks.tuning.tuned_file import tuned_text, write_keeping
from distributed_llm.common.config import CoordinatorSettings, load_settings
from distributed_llm.common.types import LayerRange

EVIL = "<script>alert('x')</script> & \"$x^2$\""
WHY = f"It is fast.\x1b\0\n# {EVIL}\nworker:\n  threads: 9"
PROVENANCE = Provenance(
    command=f"python benchmark.py --model {EVIL}\ncoordinator: {{}}",
    model=EVIL,
    machine="2 cores",
    versions="torch 2",
    workers=(f"{EVIL}: cpu",),
    asked="1, 8 requests at once",
    how="3 rounds",
)


def outcome(configuration: Configuration, rate: float = 100.0, failure: str = "") -> Outcome:
    loads = {
        1: LoadFigures(50.0, 0.6, 0.012, 0.02, 0.03, outside_share=0.25, busy={EVIL: 0.5}),
        8: LoadFigures(rate, 0.9, 0.05, 0.03, 0.09, wire_bytes_per_token=512.0),
    }
    return Outcome(configuration, (Run(loads, ((EVIL, "0-8"),)),), failure)


def pick(configuration: Configuration) -> Pick:
    return Pick("both", outcome(configuration), WHY)


def settings_of(text: str, folder: Path) -> CoordinatorSettings:
    path = folder / "tuned.yaml"
    path.write_text(text, encoding="utf-8")
    found = load_settings(path, environment={}, overrides={})
    assert found.worker.threads == 0  # no comment came alive
    return found.coordinator


# ------------------------------------------------------------------ tuned.yaml


def test_a_coordinator_takes_what_was_chosen(tmp_path: Path) -> None:
    chosen = Configuration(
        strategy="custom",
        layers=(("pc", "1-6"), ("mac", "7-8")),
        max_batch_tokens=128,
        dtype="float32",
    )
    other = pick(Configuration())
    model = 'a "folder": #1'
    text = tuned_text(pick(chosen), [other], PROVENANCE, {"model": model})
    found = settings_of(text, tmp_path)
    assert found.layers == {"pc": LayerRange(0, 6), "mac": LayerRange(6, 8)}
    assert found.model_dump(exclude={"layers"}) == {
        **CoordinatorSettings().model_dump(exclude={"layers"}),
        "model": model,
        "strategy": "custom",
        "max_batch_tokens": 128,
        "dtype": "float32",
        "min_workers": 2,
    }


def test_every_kind_of_value_survives(tmp_path: Path) -> None:
    chosen = Configuration(
        strategy="even",
        objective="latency",
        replicas=2,
        max_batch_sequences=8,
        dtype="float16",
        wire_dtype="bfloat16",
    )
    found = settings_of(tuned_text(pick(chosen), [], PROVENANCE, {}), tmp_path)
    assert {name: getattr(found, name) for name in chosen.changes} == chosen.changes


def test_defaults_that_are_best_set_nothing(tmp_path: Path) -> None:
    text = tuned_text(pick(Configuration()), [], PROVENANCE, {})
    assert settings_of(text, tmp_path) == CoordinatorSettings()
    assert "nothing is set here" in text


def test_comments_tell_of_figures_command_and_machine(tmp_path: Path) -> None:
    text = tuned_text(pick(Configuration("even")), [pick(Configuration())], PROVENANCE, {})
    said = re.sub(r"\s*\n# ", " ", text)
    assert "Chosen for latency and throughput: It is fast." in said
    assert "Best for latency and throughput: defaults." in said
    assert "command: python benchmark.py" in said
    assert "machine: 2 cores" in said
    assert "predicted" not in said
    assert all(len(line) <= 100 for line in text.splitlines())
    predicted = tuned_text(pick(Configuration()), [], PROVENANCE, {}, simulated=True)
    assert "predicted, not measured" in predicted


def test_settings_that_are_replaced_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "tuned.yaml"
    assert write_keeping(path, "first") is None
    assert write_keeping(path, "first") is None
    kept = write_keeping(path, "second")
    assert kept == tmp_path / "tuned.yaml.bak"
    assert (path.read_text(), kept.read_text()) == ("second", "first")
    assert sorted(os.listdir(tmp_path)) == ["tuned.yaml", "tuned.yaml.bak"]


# ------------------------------------------------------------------ the report


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += f"{data} "


@pytest.fixture(scope="module")
def page() -> Page:
    outcomes = [
        outcome(Configuration()),
        outcome(Configuration(strategy="custom", layers=((EVIL, "1-8"),)), 150.0),
        outcome(Configuration("even"), failure=f"it broke {EVIL}"),
    ]
    text = report_html(
        outcomes,
        [Pick("latency", outcomes[0], "Because."), Pick("throughput", outcomes[1], EVIL)],
        PROVENANCE,
        settings=f"coordinator: # {EVIL}",
        simulated=False,
        left_out=[EVIL],
        predictions={Configuration(): {1: 45.0, 8: 120.0}},
    )
    return Page(text)


def test_the_report_has_table_plots_and_advice(page: Page) -> None:
    assert page.tags.count("svg") == 4
    words = " ".join(page.words.split())
    assert f"layers {EVIL} 1-8" in words
    assert f"failed: it broke {EVIL}" in words
    assert "Best for latency: defaults Because." in words
    assert "Predicted and measured" in words
    assert "command: python benchmark.py" in words
    for cell in ("50", "100", "150", "25%", "512", "20", "30"):
        assert re.search(rf"\s{re.escape(cell)}\s", words)


def test_what_people_named_does_nothing_in_the_report(page: Page) -> None:
    assert "script" not in page.tags
    assert page.words.count(EVIL) >= 6


def test_the_report_needs_no_network(page: Page) -> None:
    assert [link for link in page.links if not link.startswith("#")] == []
    assert "img" not in page.tags
    assert "link" not in page.tags


def test_one_load_and_one_run_are_enough_for_a_report() -> None:
    alone = Run({4: LoadFigures(10.0, 1.0, 0.1, 0.1, 0.1)}, (("pc", "0-8"),))
    found = Outcome(Configuration(), (alone,))
    text = report_html(
        [found],
        [Pick("both", found, "Only this.")],
        PROVENANCE,
        settings="",
        simulated=True,
    )
    assert "Predicted, not measured" in text
