"""Described clusters: what a file may say, and what is predicted for it."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.tuning.calibration import predictions
from benchmarks.tuning.command import main
from benchmarks.tuning.configurations import Configuration
from benchmarks.tuning.description import Description, Shape, read_description
from benchmarks.tuning.figures import Outcome
from benchmarks.tuning.served import model_of_shape
from benchmarks.tuning.simulation import Asked, described_site, simulate
from distributed_llm.common.config import load_settings
from distributed_llm.common.errors import ConfigError, NotEnoughMemory

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "config/clusters/mixed.yaml"
SHAPE = Shape(layers=8, hidden_size=1024, heads=16, vocab_size=30_000, tied=True)
LAYER_BYTES = SHAPE.cost("bfloat16").layer_bytes[0]
MODEL = model_of_shape(SHAPE)
ASKED = Asked((1, 4), 16, 8)


def cluster(text: str, folder: Path) -> Description:
    path = folder / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    return read_description(path)


def two_workers(
    *, slowdown: float = 1.0, latency: str = "0.1ms", bandwidth: str = "10Gbit/s"
) -> Description:
    able = {"memory": "4GiB", "memory_bandwidth": "10GB/s", "flops": "1TFLOPS", "task": "0.1ms"}
    return Description.model_validate(
        {
            "workers": {"fast": able, "slow": {**able, "slowdown": slowdown}},
            "links": {"default": {"latency": latency, "bandwidth": bandwidth}},
        }
    )


def rates(description: Description, configuration: Configuration) -> list[float]:
    site = described_site(description, MODEL.cost("bfloat16"), "bfloat16")
    return [x.tokens_per_s for x in simulate(configuration, MODEL, site, ASKED).loads.values()]


# ------------------------------------------------------------------ the file


def test_the_example_is_read() -> None:
    found = read_description(EXAMPLE)
    assert list(found.workers) == ["gaming-pc", "laptop", "old-server"]
    assert found.workers["gaming-pc"].memory_bandwidth == 448e9
    assert found.workers["laptop"].slowdown == 1.3
    assert found.link("laptop", "gaming-pc").bandwidth == 25e6
    assert found.link("old-server", "gaming-pc").latency == pytest.approx(0.0003)
    assert found.model is not None
    assert sum(found.model.cost("bfloat16").layer_bytes) == pytest.approx(13.9e9, rel=0.01)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("workers: {}\n", ":1: workers: "),
        ("workers:\n  pc:\n    memory: 1GiB\n", ":2: workers.pc.memory_bandwidth: is missing"),
        ("wokers: {}\n", "wokers: unknown key; known here: workers, links, model"),
        (
            "workers:\n  pc: {memory: 1GiB, memory_bandwidth: 5GB/s, flops: 1TFLOPS, ram: 2}\n",
            ":2: workers.pc.ram: unknown key; known here: memory, memory_bandwidth, flops",
        ),
        (
            "workers:\n  pc:\n    memory: 1GiB\n    memory_bandwidth: fast\n    flops: 1TFLOPS\n",
            ":4: workers.pc.memory_bandwidth: should be a rate such as 50GB/s",
        ),
        (
            "workers:\n  pc: {memory: 1GiB, memory_bandwidth: 5GB/s, flops: 1TFLOPS}\n"
            "links:\n  pc/mac: {latency: 1ms}\n",
            "links: pc/mac: there is no worker 'mac'",
        ),
        (
            "workers:\n  pc: {memory: 1GiB, memory_bandwidth: 5GB/s, flops: 1TFLOPS}\n"
            "links:\n  pc: {latency: 1ms}\n",
            "should be default, or two workers",
        ),
        ("workers:\n  <b>: {memory: 1GiB, memory_bandwidth: 5GB/s, flops: 1TFLOPS}\n", "letters"),
        ("workers: &a {}\nmodel: *a\n", ":2: aliases (*name) are not allowed"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        cluster(text, tmp_path)
    assert expected in str(caught.value)
    assert "cluster.yaml:" in str(caught.value)


def test_parameters_go_before_what_follows_from_the_shape() -> None:
    given = Shape(layers=10, hidden_size=100, heads=10, vocab_size=1000, parameters=0.0012)
    assert given.cost("bfloat16").layer_bytes[0] == 200_000  # (1.2e6 - 2 x 100,000) / 10, 2 bytes
    with pytest.raises(ConfigError, match="fewer than embedding and head"):
        Shape(layers=1, hidden_size=100, heads=10, parameters=0.0001).cost("float32")


# ------------------------------------------------------------------ predictions


def test_one_token_takes_what_reading_the_weights_takes() -> None:
    site = described_site(two_workers(), MODEL.cost("bfloat16"), "bfloat16")
    run = simulate(Configuration("even"), MODEL, site, ASKED)
    assert [held for _, held in run.stages] == ["1-4", "5-8"]
    weights = 8 * LAYER_BYTES + 30_000 * 1024 * 2
    floor_s = weights / 10e9 + 2 * 0.1e-3 + 3 * 0.1e-3  # reading, two tasks, three messages
    assert run.loads[1].gap_p50_s == pytest.approx(floor_s, rel=0.1)
    assert run.loads[1].gap_p50_s > floor_s


def test_a_slow_worker_gets_fewer_layers_by_speed_than_evenly() -> None:
    description = two_workers(slowdown=4.0)
    assert (
        rates(description, Configuration("speed"))[1]
        > 1.3 * rates(description, Configuration("even"))[1]
    )


def test_slow_links_cost_time() -> None:
    near = rates(two_workers(), Configuration("even"))
    far = rates(two_workers(latency="20ms"), Configuration("even"))
    thin = rates(two_workers(bandwidth="1Mbit/s"), Configuration("even"))
    pair = two_workers(latency="20ms")
    links = {**pair.links, "slow/fast": two_workers().link("fast", "slow")}
    close = rates(pair.model_copy(update={"links": links}), Configuration("even"))
    assert far[0] < 0.9 * close[0] < 0.9 * near[0] / 1.5
    assert thin[1] < near[1] / 2


def test_more_at_once_gives_more() -> None:
    alone, full = rates(two_workers(), Configuration("even"))
    assert full > 1.5 * alone


def test_the_same_twice() -> None:
    found = [rates(two_workers(), Configuration("memory")) for _ in range(2)]
    assert found[0] == found[1]


def test_a_model_that_does_not_fit_is_told() -> None:
    able = {"memory": "32MiB", "memory_bandwidth": "10GB/s", "flops": "1TFLOPS"}
    small = Description.model_validate({"workers": {"pc": able}})
    for strategy in ("speed", "memory"):
        with pytest.raises(NotEnoughMemory, match="are missing"):
            rates(small, Configuration(strategy))


def test_a_run_foretells_itself() -> None:
    site = described_site(two_workers(slowdown=2.0), MODEL.cost("bfloat16"), "bfloat16")
    outcomes = [
        Outcome(one, (simulate(one, MODEL, site, ASKED),))
        for one in (Configuration("even"), Configuration("speed"))
    ]
    foretold = predictions(outcomes, MODEL, ASKED)
    for one in outcomes:
        expected = {count: figures.tokens_per_s for count, figures in one.loads.items()}
        assert foretold[one.configuration] == pytest.approx(expected, rel=0.25)


# ------------------------------------------------------------------ the command


def said(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_a_described_cluster_gives_table_settings_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--simulate", str(EXAMPLE), "--quick", "--output", str(tmp_path), "--loads", "1,2"]
    code, out, _ = said(arguments, capsys)
    assert code == 0
    assert "PREDICTED" in out
    assert "Best for latency: " in out
    assert "Best for throughput: " in out
    load_settings(tmp_path / "tuned.yaml", environment={}, overrides={})
    assert "<svg" in (tmp_path / "tuned.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--strategies", "fast"], 2, "--strategies: should be 'speed', 'memory'"),
        (["--strategies", "custom"], 2, "tried by --subsets"),
        (["--loads", "0,4"], 2, "--loads: should be whole numbers from 1 on"),
        (["--worker", "pc=slowdown:0.5"], 2, "should be at least 1"),
        (["--worker", "pc=speed:2"], 2, "'speed:2' is no setting and value"),
        (["--worker", "pc", "--worker", "pc"], 2, "two workers have the same name"),
        (["--listen", "here"], 2, "--listen: not an address"),
        (["--model", "/nowhere/at-all"], 2, "There is no folder '/nowhere/at-all'"),
        (["--prompt-tokens", "9000"], 2, "the context of the built-in model is 512"),
        (["--simulate", "/nowhere.yaml"], 2, "config/clusters/mixed.yaml"),
        (["--simulate", str(EXAMPLE), "--workers", "2"], 2, "exclude one another"),
        (["--workers", "0"], 2, "--workers"),
        (["--limit", "soon"], 2, "--limit: 'soon' is not a duration"),
    ],
)
def test_wrong_usage_is_told_in_a_line(
    arguments: list[str],
    code: int,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found, _, err = said([*arguments, "--output", str(tmp_path)], capsys)
    assert found == code
    assert expected in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
