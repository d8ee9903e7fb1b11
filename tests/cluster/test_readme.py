"""Every block of README is run, or checked word for word against what it describes."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from distributed_llm.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.timeout(120)


def commands_of(block: str) -> list[list[str]]:
    """Return the commands of a block, without comments and with their lines joined."""
    joined = block.replace("\\\n", " ")
    lines = [shlex.split(line.removeprefix("$ "), comments=True) for line in joined.splitlines()]
    return [line for line in lines if line]


def blocks_that(begin: str) -> Iterator[str]:
    return (block for language, block in BLOCKS if not language and block.startswith(begin))


def test_every_block_is_run_by_one_of_the_tests_here() -> None:
    beginnings = ("make ", "setup_scripts/", "dllm coordinator", "$ dllm plan")
    for language, block in BLOCKS:
        known = language == "python" or block.startswith(beginnings)
        assert known, f"no test runs this block:\n{block}"


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_make_knows_what_is_to_be_made() -> None:
    (block,) = blocks_that("make ")
    for command in commands_of(block):
        done = subprocess.run([*command, "-n"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_setup_scripts_take_what_they_are_given(tmp_path: Path) -> None:
    for name in ("setup_scripts", "pyproject.toml", "constraints.txt"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    (tmp_path / "config").mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHON": sys.executable}
    commands = [line for block in blocks_that("setup_scripts/") for line in commands_of(block)]
    assert len(commands) >= 3
    for command in commands:
        done = subprocess.run(
            ["bash", *command, "--dry-run"],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (command, done.stderr)
        given = [word for word in command[2:] if not word.startswith("--")]
        assert all(word in done.stdout for word in given), (command, done.stdout)


def test_every_verb_and_option_that_is_named_exists() -> None:
    (block,) = blocks_that("dllm coordinator")
    verbs: Any = typer.main.get_command(app)
    named = re.findall(r"^dllm (\w+)(.*?)(?=^dllm |\Z)", block, flags=re.MULTILINE | re.DOTALL)
    assert {verb for verb, _ in named} == set(verbs.commands)
    for verb, words in named:
        command = verbs.commands[verb]
        if hasattr(command, "commands"):
            command = command.commands[words.split()[0]]
        spelled = {name for option in command.params for name in option.opts}
        for option in re.findall(r"(?<!\S)\[?(--?[a-z][a-z-]*)", words):
            assert option in spelled, f"dllm {verb} has no {option}"


def test_the_plan_is_what_dllm_plan_prints(tmp_path: Path) -> None:
    (block,) = blocks_that("$ dllm plan")
    (command, *_) = commands_of(block)
    said = block.replace("\\\n", " ").split("\n", 1)[1].splitlines()
    folder = sparse_qwen3_8b(tmp_path / "Qwen3-8B")
    done = subprocess.run(
        [sys.executable, "-m", "distributed_llm", "plan", str(folder), *command[3:]],
        env={name: value for name, value in os.environ.items() if not name.startswith("DLLM_")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [line.rstrip() for line in done.stdout.splitlines()] == said


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


def test_the_python_of_readme_runs_and_shows_a_split(capfd: pytest.CaptureFixture[str]) -> None:
    (block,) = (block for language, block in BLOCKS if language == "python")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(block, "README.md", "exec"), {})
    first = shown.getvalue().splitlines()[0]
    ranges = re.findall(r"worker-\d: layers (\d)-(\d)", first)
    layers = sorted((int(start), int(stop)) for start, stop in ranges)
    assert len(layers) == 3
    assert (layers[0][0], layers[-1][1]) == (1, 8)
    assert all(one[1] + 1 == other[0] for one, other in pairwise(layers))
    said = capfd.readouterr().err
    assert "starting a coordinator and 3 workers on this machine" in said
    assert "serving plan 1" in said
