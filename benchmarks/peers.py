"""Engines in child processes that `benchmarks.engine` compares: they answer a line per question.

    {"sequences": 16, "prompt_tokens": 128, "new_tokens": 32}

asks for so many prompts of random tokens at once, and for greedy answers of so many tokens. The
answer tells the seconds until the first tokens, and from them to the last. A child sits still
between two questions, so that others can be measured beside it in turns.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

THREADS = 2
ROOT = Path(__file__).parent.parent

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""Environment in which torch uses no instruction beyond AVX2."""


@dataclass(frozen=True)
class Question:
    """Prompts of random tokens, read at once, and answers of `new_tokens` each."""

    sequences: int
    prompt_tokens: int = 128
    new_tokens: int = 32


@dataclass
class Times:
    """What the answers of one engine to one question took, seconds."""

    question: Question
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)

    @property
    def prefill_per_s(self) -> float:
        """Tokens of prompts per second, by the median."""
        asked = self.question
        return asked.sequences * asked.prompt_tokens / statistics.median(self.prefill_s)

    @property
    def decode_per_s(self) -> float:
        """Tokens per second after the first ones, by the median."""
        asked = self.question
        return asked.sequences * (asked.new_tokens - 1) / statistics.median(self.decode_s)

    @property
    def wall_s(self) -> float:
        """The median time of everything."""
        return statistics.median(map(sum, zip(self.prefill_s, self.decode_s, strict=True)))


class Asked(Protocol):
    """Who answers questions."""

    @property
    def name(self) -> str:
        """How tables call it."""

    def ask(self, question: Question) -> dict[str, Any]:
        """Return `prefill_s` and `decode_s`, seconds."""


class Peer:
    """An engine in a child process.

    Args:
        name: how tables call it.
        command: of the child.
        env: what it gets beside our environment.

    Attributes:
        loaded: what the child told when it was ready.
    """

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str] = {}) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        )
        self.loaded = self._read()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.communicate("")

    def ask(self, question: Question) -> dict[str, Any]:
        """Return the child's answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(vars(question)) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with code {self._process.wait()}; see above.")
        answer: dict[str, Any] = json.loads(line)
        return answer


# Without the script's own folder: transformers would take `kernels.py` there for a package.
_ENGINE_PEER = (sys.executable, "-P", "benchmarks/engine_peer.py")


def ours(
    folder: Path, name: str = "this engine", quantize: str = "none", *more: str, **env: str
) -> Peer:
    """Return a stage with all layers of the checkpoint.

    Args:
        folder: of the checkpoint.
        name: how tables call it.
        quantize: what its weights become.
        more: options of `benchmarks.engine_peer`.
        env: what the child gets beside our environment.
    """
    command = [*_ENGINE_PEER, str(folder), "--quantize", quantize]
    return Peer(name, [*command, *more], {"GOMP_SPINCOUNT": "10000", **env})


def transformers(folder: Path, **env: str) -> Peer:
    """Return `transformers.generate`, which pads a batch."""
    command = [*_ENGINE_PEER, str(folder), "--transformers"]
    return Peer("transformers", command, env)


def llamacpp(python: str, file: Path) -> Peer:
    """Return llama.cpp with the model of a GGUF file.

    Args:
        python: an interpreter that has `llama-cpp-python`.
        file: to load.
    """
    command = [python, "benchmarks/llamacpp_peer.py", str(file), "--threads", str(THREADS)]
    return Peer(f"llama.cpp {file.stem.split('-')[-1]}", command)


def in_turns(
    peers: Iterable[Asked], questions: Iterable[Question], rounds: int
) -> dict[tuple[str, Question], Times]:
    """Ask every peer every question, in turns (A B A B), after a short one to warm up.

    Returns:
        The times by name of the peer and question.
    """
    peers, questions = list(peers), list(questions)
    found = {(peer.name, asked): Times(asked) for asked in questions for peer in peers}
    for asked in questions:
        for peer in peers:
            peer.ask(Question(asked.sequences, prompt_tokens=16, new_tokens=2))
        for _ in range(rounds):
            for peer in peers:
                answer = peer.ask(asked)
                found[peer.name, asked].prefill_s.append(answer["prefill_s"])
                found[peer.name, asked].decode_s.append(answer["decode_s"])
    return found
