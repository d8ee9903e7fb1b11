import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distributed_llm.common import config_template
from distributed_llm.common.config import Settings, load_settings, setting_names
from distributed_llm.common.errors import ConfigError
from distributed_llm.common.settings import SECTIONS
from distributed_llm.common.types import LayerRange
from distributed_llm.common.units import parse_duration, parse_size, split_address

ROOT = Path(__file__).parents[2]
DEFAULT = ROOT / "distributed_llm" / "default.yaml"

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write config/local.yaml in a folder of its own that is the current one."""
    monkeypatch.chdir(tmp_path)
    path = Path("config/local.yaml")

    def write_file(content: str | bytes) -> Path:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def load(
    path: Path | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    return load_settings(path, environment=environment or {}, overrides=overrides or {})


def refusal(
    path: Path | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, environment, overrides)
    assert caught.value.exit_code == 2
    assert len(str(caught.value)) < 1024
    return str(caught.value)


# --- default.yaml


def test_default_yaml_is_made_from_the_settings() -> None:
    text = (DEFAULT).read_text(encoding="utf-8")
    assert text == config_template.render()


def test_default_yaml_gives_the_defaults() -> None:
    path = DEFAULT
    assert load(path) == Settings()
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert [(section, name) for section in given for name in given[section]] == setting_names()


@pytest.mark.parametrize(("section", "name"), setting_names())
def test_every_setting_is_described_and_tells_its_unit(section: str, name: str) -> None:
    description = SECTIONS[section].model_fields[name].description
    assert description
    assert not name.endswith("_s") or ", s." in description or ", s;" in description


@pytest.mark.parametrize("path", sorted((ROOT / "config/examples").glob("*.yaml")), ids=str)
def test_examples_are_valid(path: Path) -> None:
    assert load(path) != Settings()


# --- where values come from


def test_later_sources_win(write: Write) -> None:
    path = write("worker:\n  name: file\n  threads: 1\n  slowdown: 2\n")
    environment = {"DLLM_WORKER__NAME": "variable", "DLLM_WORKER__THREADS": "2", "HOME": "x"}
    settings = load(path, environment, {"worker.name": "flag", "worker.device": None})
    assert settings.worker.name == "flag"
    assert settings.worker.threads == 2
    assert settings.worker.slowdown == 2
    assert settings.worker.device == "auto"


def test_the_process_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLLM_WORKER__NAME", "leaked")
    assert load().worker.name == ""
    assert Settings().worker.name == ""


def test_a_map_of_layers_is_replaced_not_merged(write: Write) -> None:
    path = write("coordinator:\n  strategy: custom\n  layers: {pc: 1-4, mac: 5, pi: 6 - 8}\n")
    assert load(path).coordinator.layers == {
        "pc": LayerRange(0, 4),
        "mac": LayerRange(4, 5),
        "pi": LayerRange(5, 8),
    }
    settings = load(path, {"DLLM_COORDINATOR__LAYERS": "a=1-2, b=3-8"})
    assert settings.coordinator.layers == {"a": LayerRange(0, 2), "b": LayerRange(2, 8)}
    settings = load(path, overrides={"coordinator.layers": {"a": LayerRange(0, 8)}})
    assert settings.coordinator.layers == {"a": LayerRange(0, 8)}
    assert settings.model_dump(mode="json")["coordinator"]["layers"] == {"a": "1-8"}


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load().worker.name = "x"


@pytest.mark.parametrize(
    "content",
    ["", "\n", "# nothing\n", "---\n", "worker:\n", "worker:\n  # threads: 4\nclient: {}\n"],
)
def test_an_empty_file_gives_the_defaults(write: Write, content: str) -> None:
    assert load(write(content)) == Settings()


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbfworker:\n  threads: 4\n", b"worker:\r\n  threads: 4\r\n"],
    ids=["byte order mark", "carriage returns"],
)
def test_files_from_windows(write: Write, content: bytes) -> None:
    assert load(write(content)).worker.threads == 4


# --- what is refused


FILES = {
    "unknown key": (
        "coordinator:\n\n\n\n\n\n  heartbeat_intervall_s: 1\n",
        "config/local.yaml:7: unknown key 'coordinator.heartbeat_intervall_s'; "
        "did you mean 'heartbeat_interval_s'?",
    ),
    "unknown section": ("workers: {}\n", ":1: unknown key 'workers'; did you mean 'worker'?"),
    "key of another section": (
        "worker:\n  strategy: even\n",
        ":2: unknown key 'worker.strategy'; did you mean 'coordinator.strategy'?",
    ),
    "key outside a section": ("slowdown: 2\n", "did you mean 'worker.slowdown'?"),
    "nothing near": ("zzz: 1\n", ":1: unknown key 'zzz'; known here: coordinator, worker, client"),
    "wrong type": ("worker:\n  threads: many\n", ":2: worker.threads: should be a whole number"),
    "number for text": ("worker:\n  name: 7\n", ":2: worker.name: should be a valid string"),
    "yes for number": ("worker:\n  threads: yes\n", ":2: worker.threads: should be a number"),
    "no value": ("worker:\n  threads:\n", ":2: worker.threads: should be a whole number"),
    "section is a number": ("worker: 5\n", ":1: worker: should be a section, not 5"),
    "list": ("- 1\n", ":1: expected sections such as 'worker:', found [1]"),
    "only text": ("hello\n", ":1: expected sections such as 'worker:', found 'hello'"),
    "neither auto nor a possible number": (
        "coordinator:\n  max_context: 0\n",
        "coordinator.max_context: should be 'auto' or at least 1, not 0",
    ),
    "negative time": ("client:\n  connect_timeout_s: -1\n", "should be above 0, not -1"),
    "negative time, unit": ("client:\n  connect_timeout_s: -5s\n", "should be above 0"),
    "no number": (
        "worker:\n  slowdown: .nan\n",
        "2: worker.slowdown: should be at most 1000, not nan",
    ),
    "no time": ("client:\n  connect_timeout_s: .nan\n", "should be above 0, not nan"),
    "endless": ("client:\n  connect_timeout_s: .inf\n", ":2: client.connect_timeout_s: should be"),
    "huge": (f"client:\n  connect_timeout_s: 1{'0' * 400}\n", ":2: client.connect_timeout_s: too"),
    "unit of time": ("client:\n  connect_timeout_s: 3 weeks\n", "not a duration; write seconds"),
    "speeding up": ("worker:\n  slowdown: 0.5\n", "at least 1, not 0.5"),
    "timeouts": (
        "coordinator:\n  silence_timeout_s: 2s\n",
        ":2: coordinator.silence_timeout_s: 2 s must be more than twice heartbeat_interval_s (1 s)",
    ),
    "timeouts, the other": (
        "coordinator:\n  heartbeat_interval_s: 2\n",
        ":2: coordinator.heartbeat_interval_s: 4 s must be more than twice",
    ),
    "port 70000": ("coordinator:\n  bind: 127.0.0.1:70000\n", ":2: coordinator.bind: port 70000"),
    "port 0 of others": ("worker:\n  coordinator: pc:0\n", "port 0 is nobody's"),
    "memory without unit": (
        "worker:\n  max_memory: 6\n",
        ":2: worker.max_memory: should be at least 1024 bytes, as a number with a unit, such",
    ),
    "no whole number": (
        "coordinator:\n  max_context: 5x\n",
        "max_context: should be 'auto' or a whole number, not '5x'",
    ),
    "no IP address": (
        "coordinator:\n  bind: 1270.0.0.1:5555\n",
        "bind: '1270.0.0.1' is no IP address; write HOST:PORT, such as 192.168.1.100:5555",
    ),
    "no IPv6 address": ("coordinator:\n  bind: '[::g]:5555'\n", "'::g' is no IP address; write"),
    "memory with nonsense": ("worker:\n  max_memory: 6GiB!\n", "not a size; write a number"),
    "log level": ("worker:\n  log_level: loud\n", ":2: worker.log_level: should be 'debug', "),
    "device": (
        "worker:\n  device: cuda:x\n",
        "should be auto, fastest, cpu, cuda, cuda:1, mps or xpu",
    ),
    "name": ("worker:\n  name: a b\n", "should be up to 64 letters"),
    "line break": ('worker:\n  model: "a\\nb"\n', "should be one line of text"),
    "duplicate key": (
        "worker:\n  threads: 1\n  name: pc\n  threads: 2\n",
        ":4: duplicate key 'worker.threads', first given on line 2",
    ),
    "duplicate section": ("worker: {}\nworker: {}\n", ":2: duplicate key 'worker', first given"),
    "duplicate worker": (
        "coordinator:\n  layers:\n    pc: 0-1\n    pc: 1-2\n",
        ":4: duplicate key 'coordinator.layers.pc', first given on line 3",
    ),
    "python object": (
        "worker:\n  name: !!python/object/apply:os.getcwd []\n",
        ":2: the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd' is not allowed",
    ),
    "python name": ("worker:\n  name: !!python/name:os.system\n", ":2: the tag "),
    "python map": ("!!python/object:os.x {}\n", ":1: the tag "),
    "alias bomb": (
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
        ":2: aliases (*name) are not allowed; repeat the value",
    ),
    "merged map": ("worker:\n  <<: {threads: 1}\n", ":2: the key '<<' is not text"),
    "number as key": ("1: 2\n", ":1: the key '1' is not text; put it in quotes"),
    "list as key": ("? [a]\n: 1\n", ":1: the key "),
    "no such date": ("worker:\n  name: 2026-13-45\n", "is not a valid timestamp; put text in"),
    "no such flag": ("worker:\n  name: !!bool maybe\n", ":2: 'maybe' is not a valid bool"),
    "two documents": ("worker: {}\n---\nworker: {}\n", ":2: is not valid YAML: "),
    "broken": ("worker:\n  name: 'pc\n", "config/local.yaml:3: is not valid YAML: "),
    "tab": ("worker:\n\tname: pc\n", ":2: is not valid YAML: "),
    "control character": ("worker:\n  name: a\x07b\n", ":2: the character '\\x07' is not allowed"),
    "nested": ("[" * 100_000, "config/local.yaml:1: lists and maps are nested too deeply"),
    "too large": ("#" * (1 << 18) + "\n", "config/local.yaml: is larger than 256 KiB"),
    "not UTF-8": (b"worker:\n  name: b\xfcro\n", ":2: is not UTF-8 text; save it as UTF-8"),
    "UTF-16": ("worker: {}".encode("utf-16"), ":1: is not UTF-8 text"),
}


@pytest.mark.parametrize(("content", "expected"), FILES.values(), ids=FILES)
def test_files_refused(write: Write, content: str | bytes, expected: str) -> None:
    message = refusal(write(content))
    assert message.startswith("config/local.yaml:")
    assert expected in message
    assert "\n" not in message


LAYERS = {
    "gap": ("{a: 1-4, b: 6-8}", "nobody serves layer 5, between workers 'a' and 'b'"),
    "overlap": ("{a: 1-4, b: 4-8}", "workers 'a' and 'b' both serve layer 4"),
    "same": ("{a: 1-4, b: 1-4}", "workers 'a' and 'b' both serve layer 1"),
    "inside": ("{a: 1-8, b: 3-4, c: 9}", "workers 'a' and 'b' both serve layer 3"),
    "late start": ("{b: 5-8, a: 3-4}", "nobody serves layers 1-2"),
    "backwards": ("{a: 4-1}", "coordinator.layers.a: '4-1' is not a range of layers"),
    "from 0": ("{a: 0-8}", "coordinator.layers.a: '0-8' is not a range of layers"),
    "not a range": ("{a: all}", "coordinator.layers.a: 'all' is not a range of layers"),
    "three ends": ("{a: 1-2-3}", "'1-2-3' is not a range of layers"),
    "a pair": ("{a: [1, 8]}", "'[1, 8]' is not a range of layers; write 1-8 for the first eight"),
    "a flag": ("{a: yes}", "'True' is not a range of layers"),
    "no layer": ("{a: 0}", "coordinator.layers.a: '0' is not a range of layers"),
    "a list": ("[1, 4]", "coordinator.layers: should be a valid dictionary"),
    "name": ("{a b: 1-4}", "coordinator.layers.a b: should be up to 64 letters"),
    "none": ("{}", "coordinator.strategy: strategy custom needs `layers`"),
    "named twice": ("a=1-4,a=5-8", "coordinator.layers: worker 'a' is named twice"),
    "no end": ("a", "coordinator.layers.a: '' is not a range of layers"),
}


@pytest.mark.parametrize(("layers", "expected"), LAYERS.values(), ids=LAYERS)
def test_layer_maps_refused(write: Write, layers: str, expected: str) -> None:
    path = write(f"coordinator:\n  strategy: custom\n  layers: {layers}\n")
    message = refusal(path)
    assert message.startswith("config/local.yaml:" + ("2:" if layers == "{}" else "3:"))
    assert expected in message


def test_layers_without_strategy_custom(write: Write) -> None:
    assert "only strategy custom reads it" in refusal(write("coordinator:\n  layers: {a: 1-4}\n"))


def test_all_problems_at_once(write: Write) -> None:
    message = refusal(write("worker:\n  theads: 1\n  nam: x\n"), {"DLLM_CLIENT__X": "1"})
    assert len(message.splitlines()) == 3
    message = refusal(write("worker:\n  threads: x\nclient:\n  coordinator: y\n"))
    assert len(message.splitlines()) == 2


def test_missing_file(write: Write) -> None:
    assert "absent.yaml: no such file; `dllm config init absent.yaml` writes one" in refusal(
        Path("absent.yaml")
    )
    assert "cannot be read" in refusal(Path("a\0b"))


def test_folder(write: Write, tmp_path: Path) -> None:
    assert "is a folder; name a file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("DLLM_WORKER__TREADS", "did you mean DLLM_WORKER__THREADS?"),
        ("dllm_worker__treads", "unknown variable dllm_worker__treads; did you mean DLLM_WORKER__"),
        ("DLLM_WORKER_THREADS", "did you mean DLLM_WORKER__THREADS?"),
        ("DLLM_WORKER", "environment: unknown variable DLLM_WORKER"),
        ("DLLM_COORDINATOR__LAYERS__PC", "did you mean DLLM_COORDINATOR__LAYERS?"),
    ],
)
def test_unknown_variables(variable: str, expected: str) -> None:
    message = refusal(environment={variable: "1"})
    assert message.startswith("environment: unknown variable ")
    assert expected in message


def test_variables_of_the_setup_scripts_are_known() -> None:
    assert load(environment={"DLLM_TORCH_INDEX_URL": "x"}) == Settings()


@pytest.mark.parametrize("value", ["", "x", "-1", "1.5", "nan", "1e3", "{}", "true"])
def test_wrong_variables(value: str) -> None:
    message = refusal(environment={"DLLM_WORKER__THREADS": value})
    assert message.startswith("environment: DLLM_WORKER__THREADS: worker.threads: should be")


def test_variables_in_small_letters() -> None:
    assert load(environment={"dllm_worker__threads": "3"}).worker.threads == 3


def test_overrides_refused() -> None:
    message = refusal(overrides={"worker.thread": 1})
    assert message == "command line: unknown key 'worker.thread'; did you mean 'threads'?"
    message = refusal(overrides={"worker.threads": -1})
    assert message.startswith("command line: --threads (worker.threads): should be at least 0")
    assert "unknown key 'nonsense'" in refusal(overrides={"nonsense": 1})


@given(st.text(max_size=200) | st.binary(max_size=200))
def test_any_file_gives_settings_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, content: str | bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    try:
        load(path)
    except ConfigError as error:
        assert str(path) in str(error)  # noqa: PT017


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)


@given(st.sampled_from(setting_names()), plain_values)
def test_any_value_gives_settings_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, setting: tuple[str, str], value: object
) -> None:
    section, name = setting
    path = tmp_path_factory.getbasetemp() / "value.yaml"
    path.write_text(json.dumps({section: {name: value}}), encoding="utf-8")
    try:
        load(path)
    except ConfigError as error:
        assert str(path) in str(error)  # noqa: PT017


# --- sizes, times, addresses


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("512MiB", 512 * 2**20),
        ("6GiB", 6 * 2**30),
        ("6G", 6 * 10**9),
        ("6GB", 6 * 10**9),
        ("6 gib", 6 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("100k", 100_000),
        ("2048", 2048),
        (2048, 2048),
        ("", None),
        (None, None),
    ],
)
def test_sizes(text: object, count: int | None) -> None:
    assert parse_size(text) == count
    assert load(overrides={"worker.max_memory": text}).worker.max_memory == count


@pytest.mark.parametrize("value", ["6GiBs", "6Gbit", "GiB", "-1G", "6 G B", "nan", True, 1.5, []])
def test_sizes_refused(value: object) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("500ms", 0.5), ("5m", 300), ("1 h", 3600), ("2.5", 2.5), (3, 3), (0.25, 0.25)],
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "value", ["", "s", "1e3", "nan", "inf", "1w", "1s1", "\uff11s", True, None]
)
def test_durations_refused(value: object) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("127.0.0.1:5555", ("127.0.0.1", 5555)),
        ("my-pc.local:1", ("my-pc.local", 1)),
        ("my_service:65535", ("my_service", 65535)),
        ("[::1]:5555", ("::1", 5555)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
    ],
)
def test_addresses(text: str, parts: tuple[str, int]) -> None:
    assert split_address(text) == parts
    assert load(overrides={"coordinator.bind": text}).coordinator.bind == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":5555",
        "pc",
        "pc:",
        "pc:x",
        "pc:-1",
        "pc:65536",
        "pc:70000",
        "pc:\u0663",
        "tcp://pc:5555",
        "::1:5555",
        "[pc]:5555",
        "[::1:5555",
        "1.2.3:5555",
        "1.2.3.999:5555",
        "*:5555",
        "a b:5555",
        "-pc:5555",
        "pc-:5555",
        f"{'a' * 254}:5555",
    ],
)
def test_addresses_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        split_address(text)
    assert refusal(overrides={"client.coordinator": text}).startswith(
        "command line: --coordinator (client.coord"
    )


# --- config/local.yaml


def test_a_local_file_says_what_was_chosen_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "local.yaml"
    chosen = {"worker.name": "pc", "worker.coordinator": "192.168.1.100:5555"}
    arguments = [str(path)]
    for name, value in chosen.items():
        arguments += ["--set", f"{name}={value}"]
    assert config_template.main(arguments) == 0
    text = path.read_text(encoding="utf-8")
    assert yaml.safe_load(text) == {
        "coordinator": None,
        "worker": {"coordinator": "192.168.1.100:5555", "name": "pc"},
        "client": None,
        "api": None,
    }
    assert load(path) == load(overrides=chosen)
    assert all(f"{name}: " in text for _, name in setting_names())
    assert config_template.main([str(path), "--set", "worker.name=other"]) == 0  # kept
    assert path.read_text(encoding="utf-8") == text


def test_a_local_file_with_every_comment_removed_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "local.yaml"
    lines = config_template.render({}).splitlines()
    names = tuple(f"  # {name}: " for _, name in setting_names())
    path.write_text(
        "\n".join(line.replace("# ", "", 1) if line.startswith(names) else line for line in lines),
        encoding="utf-8",
    )
    assert load(path) == Settings()
    assert len(yaml.safe_load(path.read_text(encoding="utf-8"))["worker"]) == len(
        SECTIONS["worker"].model_fields
    )


def test_a_local_file_with_a_wrong_value_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "local.yaml"
    assert config_template.main([str(path), "--set", "worker.coordinator=pc:70000"]) == 2
    assert "port 70000 does not exist" in capsys.readouterr().err
    assert not path.exists()
    assert config_template.main([str(tmp_path / "absent" / "local.yaml")]) == 2
    assert "cannot be written" in capsys.readouterr().err
