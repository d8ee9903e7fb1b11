"""Every block of README is run: dry where it would install something or serve for ever."""

import contextlib
import functools
import io
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from distributed_llm import api_command, cli, up_command, worker_command
from distributed_llm.client.new_key import NewKey
from distributed_llm.common.cache_folder import CACHE_VARIABLE, cache_folder
from distributed_llm.common.join_line import JoinLine
from distributed_llm.common.keyring import STATE_VARIABLE
from distributed_llm.common.messages import (
    ClusterStatus,
    Enrolled,
    Generate,
    ModelInfo,
    ToClient,
    TokenLogprobs,
)
from distributed_llm.common.roles import Role
from distributed_llm.common.transport import new_key_pair
from distributed_llm.weights.cache.content_cache import ContentCache
from distributed_llm.worker.way_in import WayIn
from tests.fake_coordinator import FakeCoordinator, finished, piece
from tests.wire.strategies import example

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

BEGIN = ("up", "api", "coordinator", "worker", "join", "service", "drain", "demo")
"""Verbs of `dllm` that begin something, which is not done here."""

pytestmark = pytest.mark.timeout(120)


class Block(NamedTuple):
    language: str
    text: str


def blocks_of(document: str) -> Iterator[Block]:
    """Yield the fenced blocks of a Markdown document, however they are fenced."""
    fence, language, lines = "", "", list[str]()
    for line in document.splitlines():
        mark = re.match(r"\s*(`{3,}|~{3,})\s*(\S*)", line)
        if not fence and mark:
            fence, language = mark[1], mark[2]
        elif fence and mark and mark[1].startswith(fence) and not mark[2]:
            yield Block(language, "\n".join(lines) + "\n")
            fence, lines = "", []
        elif fence:
            lines.append(line)
    assert not fence, "a block has no end"


BLOCKS = list(blocks_of(README))


def test_blocks_are_found_however_they_are_fenced() -> None:
    text = "a\n```sh\nmake\n```\n  ~~~~ python title\n```\nx\n  ~~~~\n"
    assert list(blocks_of(text)) == [Block("sh", "make\n"), Block("python", "```\nx\n")]


def test_a_block_that_nobody_runs_fails() -> None:
    for block in (Block("", "make demo\n"), Block("ruby", "puts 1\n")):
        with pytest.raises(pytest.fail.Exception, match="no test runs"):
            run(block, Path())


@pytest.mark.parametrize("command", ["curl x | sh", "rm -rf x", "dllmm status"])
def test_a_command_that_nobody_runs_fails(command: str) -> None:
    with pytest.raises(pytest.fail.Exception, match="no test runs"):
        run(Block("sh", f"{command}\n"), Path())


@pytest.mark.parametrize(
    "block",
    [
        Block("sh", "make demos\n"),
        Block("sh", "make tests\n"),
        Block("sh", "setup_scripts/setup_linux.sh workers --coordinator pc:5555\n"),
        Block("sh", "setup_scripts/setup_linux.sh worker --coordinator pc:5555 --thread 4\n"),
        Block("powershell", "powershell -File setup_scripts\\setup_windows.ps1 demos\n"),
        Block("powershell", "powershell -File setup_scripts\\setup.ps1 demo\n"),
        Block("console", "$ dllm plan '' --worker pc=1GiB\nno such line\n"),
        Block("console", "$ dllm plans\n"),
        Block("text", "dllm coordinator [--strategy speed|slow]\n"),
        Block("text", "dllm status [--jsn]\n"),
        Block("text", "dllm generate [--top-k many]\n"),
        Block("python", "import distributed_llm.no_such_module\n"),
    ],
    ids=lambda block: block.text.strip(),
)
def test_a_wrong_block_fails(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, ImportError)):
        run(block, tmp_path, monkeypatch)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.text.partition("\n")[0][:40])
def test_block(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(block, tmp_path, monkeypatch)


def run(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
    """Run a block in a folder of its own; fail if that is impossible or goes wrong."""
    match block.language:
        case "sh":
            for command in commands_of(block.text):
                run_command(command, folder)
        case "powershell":
            for line in block.text.splitlines():
                check_powershell(line)
        case "console":
            check_output(block.text, folder)
        case "text" if monkeypatch and block.text.startswith("dllm "):
            for command in synopsis_of(block.text):
                assert command[0] == "dllm", command
                run_dllm(command[1:], folder, monkeypatch)
        case "python":
            run_python(block.text)
        case _:
            pytest.fail(f"no test runs this block:\n{block.text}")


def commands_of(text: str) -> list[list[str]]:
    """Return the commands of a block, without comments and with their lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def synopsis_of(text: str) -> list[list[str]]:
    """Return the commands of a synopsis with all its options.

    Further lines of a command are indented; several commands may stand on one line.
    """
    text = re.sub(r"\n\s+", " ", text).replace("[", "").replace("]", "")
    return commands_of(re.sub(r" {2,}(?=dllm )", "\n", text))


def run_command(command: list[str], folder: Path) -> None:
    if command[0] == "make":
        if shutil.which("make") is None:
            pytest.skip("there is no make here")
        english = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(
            [*command, "-n"], cwd=ROOT, env=english, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "Nothing to be done" not in done.stdout, "a file or folder has this name"
    elif command[0].startswith("setup_scripts/"):
        if shutil.which("bash") is None:
            pytest.skip("there is no bash here")
        check_setup([whole(word) for word in command], folder)
    elif command[0] == "dllm":
        parse(command[1:])
    else:
        pytest.fail(f"no test runs {shlex.join(command)}")


def whole(word: str) -> str:
    """Return a line to join with in place of the beginning of one; other words as they are."""
    if not word.startswith("dllm://"):
        return word
    address = word.removeprefix("dllm://").partition("/")[0]
    return str(JoinLine(address, new_key_pair().public, new_key_pair().secret))


def check_setup(command: list[str], folder: Path) -> None:
    """Run a setup script dry; have `dllm` read what the script would pass on to it."""
    native = "distributed_llm/worker/model/kernels/native"
    for name in ("setup_scripts", "pyproject.toml", "setup.py", "constraints.txt", native):
        source = ROOT / name
        copy: Callable[..., Any] = shutil.copy
        if source.is_dir():
            copy = functools.partial(shutil.copytree, dirs_exist_ok=True)
        copy(source, folder / name)
    (folder / "config").mkdir(exist_ok=True)
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", *command, "--dry-run"],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (command, done.stderr)
    given = [word for word in command[2:] if not word.startswith("--")]
    shown = [re.sub(r"^(dllm://.*/).*", r"\1...", word) for word in given]  # tokens are secrets
    assert all(word in done.stdout for word in shown), (command, done.stdout)
    passed = re.findall(r"\.venv/bin/dllm\"? (.*)$", done.stdout, flags=re.MULTILINE)
    assert passed, done.stdout
    for one in passed:
        parse(shlex.split(one))


def parse(arguments: list[str]) -> None:
    """Have `dllm` read a command line, without doing what it says."""
    verb, *options = arguments
    command: Any = verbs().get(verb)
    while hasattr(command, "commands"):
        verb, *options = options
        command = command.commands.get(verb)
    assert command, f"there is no dllm {verb}"
    try:
        command.make_context(verb, list(options))
    except Exception as exc:
        raise AssertionError(f"dllm {shlex.join(arguments)}: {exc}") from exc


def verbs() -> dict[str, Any]:
    import typer

    commands: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    return commands


def check_powershell(command: str) -> None:
    """Check that a script is there and has the role; PowerShell itself is only on Windows."""
    script, role = re.findall(r"-File (\S+) (\S+)", command)[0]
    path = ROOT / script.replace("\\", "/")
    assert path.exists(), path
    assert re.search(rf"^  {role}  ", path.read_text(encoding="utf-8"), re.MULTILINE), role


def check_output(text: str, folder: Path) -> None:
    """Run `$ dllm ...` and compare what it prints with the lines below."""
    line, *said = re.sub(r"\\\n", " ", text).splitlines()
    prompt, program, *arguments = shlex.split(line)
    assert (prompt, program) == ("$", "dllm"), f"no test runs {line}"
    model = folder / "Qwen3-8B"
    arguments = [
        str(sparse_qwen3_8b(model)) if word == "/models/Qwen3-8B" else word for word in arguments
    ]
    done = subprocess.run(
        [sys.executable, "-m", "distributed_llm", *arguments],
        env={
            name: value
            for name, value in os.environ.items()
            if not name.startswith("DLLM_") or name == CACHE_VARIABLE
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [one.rstrip() for one in done.stdout.splitlines()] == said


# ------------------------------------------------------------------ dllm


def variants(words: list[str]) -> Iterator[list[str]]:
    """Yield command lines that together have each of the values in a|b|c."""
    values = [word.split("|") for word in words]
    for number in range(max(map(len, values))):
        yield [one[min(number, len(one) - 1)] for one in values]


def run_dllm(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a line of the synopsis with all its options, against a coordinator that plays its part.

    What would serve for ever is not begun, and no worker is told to leave.
    """
    for name in os.environ.keys() - {STATE_VARIABLE, CACHE_VARIABLE}:
        if name.startswith("DLLM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    monkeypatch.setenv("KMP_BLOCKTIME", "1")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.chdir(folder)
    begun: list[str] = []

    def begins(verb: str) -> Callable[..., Any]:
        return lambda *_, **__: begun.append(verb)

    async def serves(*_: Any, **__: Any) -> int:
        begun.append("serve")
        return 0

    async def finds_way_in(*_: Any) -> WayIn:
        return WayIn((), None)

    async def enrols(*_: Any) -> Enrolled:
        return Enrolled(name="pc", role=Role.WORKER)

    async def makes_key(*_: Any, **__: Any) -> NewKey:
        return NewKey("key", "app")

    for module in (cli, api_command, up_command, worker_command):
        monkeypatch.setattr(module, "start_process", lambda *_, **__: None)
    monkeypatch.setattr("distributed_llm.client.enrolment.enrol", enrols)
    monkeypatch.setattr("distributed_llm.client.new_key.create_key", makes_key)
    monkeypatch.setattr("distributed_llm.api.serve.serve", serves)
    monkeypatch.setattr("distributed_llm.coordinator.serve.serve", serves)
    monkeypatch.setattr("distributed_llm.worker.way_in.find_way_in", finds_way_in)
    monkeypatch.setattr("distributed_llm.worker.work.work", serves)
    monkeypatch.setattr("distributed_llm.up.run.run", serves)
    monkeypatch.setattr("distributed_llm.services.perform.install", begins("install"))
    monkeypatch.setattr("distributed_llm.services.perform.remove", begins("remove"))
    monkeypatch.setattr("distributed_llm.console.drain", begins("drain"))
    monkeypatch.setattr("distributed_llm.console.run_demo", begins("demo"))
    with FakeCoordinator(answers, example(ClusterStatus), example(ModelInfo)) as coordinator:
        monkeypatch.setenv("DLLM_CLIENT__COORDINATOR", coordinator.address)
        meant = {"MODEL": "", "N": "2", "NAME": "pc", "PATH": str(folder), "ID": "1234-5678"}
        for variant in variants(words):
            options = [whole(meant.get(word, word)) for word in variant]
            options = [coordinator.address if word == "HOST:5555" else word for word in options]
            Path("dllm.yaml").unlink(missing_ok=True)
            if options[:2] != ["config", "init"]:
                text = "coordinator:\n  strategy: custom\n  layers: {pc: 1-8}\n"
                Path("dllm.yaml").write_text(text)
            if "custom" in options:  # it takes a file that says which layers
                options += ["--config", "dllm.yaml"]
            ContentCache(cache_folder(), None).note_model("pc", {})  # for who deletes its weights
            begun.clear()
            done = CliRunner().invoke(cli.app, options)
            assert done.exit_code == 0, (options, done.output, done.exception)
            assert bool(begun) == (options[0] in BEGIN)


def answers(request: Generate) -> list[ToClient]:
    params = request.params
    logprobs = () if params.logprobs is None else (TokenLogprobs(logprob=-1.0),)
    return [
        *(piece(request, "x", 7, choice=i, logprobs=logprobs, end="stop") for i in range(params.n)),
        finished(request),
    ]


def test_every_verb_is_named() -> None:
    synopses = [synopsis_of(text) for language, text in BLOCKS if language == "text"]
    assert {command[1] for commands in synopses for command in commands} == set(verbs())


# ------------------------------------------------------------------ models


def sparse_qwen3_8b(folder: Path) -> Path:
    """Return a checkpoint with the shapes of Qwen3-8B, in a file that takes no room on the disk."""
    hidden, inner, vocab, layers = 4096, 12288, 151936, 36
    sizes = {
        "self_attn.q_proj": [4096, hidden],
        "self_attn.k_proj": [1024, hidden],
        "self_attn.v_proj": [1024, hidden],
        "self_attn.o_proj": [hidden, 4096],
        "self_attn.q_norm": [128],
        "self_attn.k_norm": [128],
        "mlp.gate_proj": [inner, hidden],
        "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner],
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
    }
    shapes = {"model.embed_tokens": [vocab, hidden], "lm_head": [vocab, hidden]}
    shapes["model.norm"] = [hidden]
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in sizes.items()}
    at, header = 0, {}
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        offsets = [at, at + size]
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
        at += size
    folder.mkdir()
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": vocab,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ------------------------------------------------------------------ Python


@functools.cache
def run_python(text: str) -> tuple[str, str]:
    """Run a program; return what it printed on stdout and stderr."""
    shown, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(told):
        exec(compile(text, "README.md", "exec"), {})
    return shown.getvalue(), told.getvalue()


def test_the_python_of_readme_shows_a_split() -> None:
    shown, told = run_python(next(text for language, text in BLOCKS if language == "python"))
    first = shown.splitlines()[0]
    ranges = re.findall(r"worker-\d: layers (\d)-(\d)", first)
    layers = sorted((int(start), int(stop)) for start, stop in ranges)
    assert len(layers) == 3
    assert (layers[0][0], layers[-1][1]) == (1, 8)
    assert all(one[1] + 1 == other[0] for one, other in pairwise(layers))
    assert "starting a coordinator and 3 workers on this machine" in told
    assert "serving plan 1" in told
