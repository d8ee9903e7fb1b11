"""How near the engine comes to what this machine can do, and to other engines on it.

    python -m benchmarks.engine bf16 --llama-python PYTHON     against llama.cpp and transformers
    python -m benchmarks.engine int8 --llama-python PYTHON     against llama.cpp Q8_0
    python -m benchmarks.engine int4 --llama-python PYTHON     against llama.cpp Q4_0
    python -m benchmarks.engine cluster                        three workers, one, transformers
    python -m benchmarks.engine avx2                           without AVX-512, against transformers
    python -m benchmarks.engine moe                            a mixture of experts
    python -m benchmarks.engine load [--base CHECKOUT]         loading and quantising
    python -m benchmarks.engine profile                        where the time of a step goes

Several parts may be named; each measures the limits of the machine first. All engines compute with
random weights in the shape of a 1.1 B Llama, in child processes with two threads, and are asked in
turns (A B A B); figures are medians. PYTHON has `llama-cpp-python`; see `benchmarks.llamacpp_peer`.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import peers
from benchmarks.common import print_table
from benchmarks.engine_cluster import ClusterPeer
from benchmarks.engine_loading import print_loading
from benchmarks.engine_profile import print_profile
from benchmarks.gguf_checkpoint import gguf_checkpoint
from benchmarks.machine_limits import Limits, measure_limits, print_limits
from benchmarks.make_checkpoint import make_checkpoint, make_experts_checkpoint
from benchmarks.peers import Peer, Question, Times, in_turns

ONE, MANY, PREFILL = Question(1), Question(16), Question(1, 512, 1)
BATCH = Question(16, 128, 33)


@dataclass(frozen=True)
class Given:
    """What the command line says.

    Attributes:
        folder: of the checkpoint.
        rounds: that count.
        llama_python: an interpreter with `llama-cpp-python`, or None.
        base: another checkout of this repository, or None.
    """

    folder: Path
    rounds: int
    llama_python: str | None
    base: Path | None


@dataclass(frozen=True)
class Row:
    """A line of a table: a speed beside that of another engine, or a limit."""

    what: str
    ours: float
    other: str
    theirs: float
    target: float

    def cells(self) -> tuple[object, ...]:
        """Return what the table shows."""
        ratio = self.ours / self.theirs
        met = "yes" if ratio >= self.target else "no"
        return self.what, self.ours, self.other, self.theirs, ratio, self.target, met


_HEAD = ("what", "ours", "against", "theirs", "ratio", "target", "met")


# ------------------------------------------------------------------ one process


def bf16(given: Given, limits: Limits) -> list[Row]:
    """Compare a stage in bfloat16 with the limit, llama.cpp and transformers."""
    with ExitStack() as stack:
        own = stack.enter_context(peers.ours(given.folder))
        theirs = stack.enter_context(peers.transformers(given.folder))
        llama = _llama(stack, given, "bf16")
        found = in_turns([own, theirs, *llama], (ONE, MANY, PREFILL), given.rounds)
    ours, other = _of(found, own.name), _of(found, theirs.name)
    f32_first = limits.flops["float32"] > limits.flops["bfloat16"]
    rows = [
        _against_limit("bf16, 1 sequence", ours[ONE], _read_bytes(own), limits, 0.85),
        _decode("bf16, 16 sequences", ours[MANY], theirs.name, other[MANY], 1.3),
        _prefill("bf16, prompts of 16 x 128", ours[MANY], theirs.name, other[MANY], 1.05),
        _prefill(
            "bf16, prompt of 512",
            ours[PREFILL],
            theirs.name,
            other[PREFILL],
            (1.05, 1.8)[f32_first],
        ),
    ]
    for peer in llama:
        other = _of(found, peer.name)
        rows += [
            _decode("bf16, 1 sequence", ours[ONE], peer.name, other[ONE], 1.0),
            _decode("bf16, 16 sequences", ours[MANY], peer.name, other[MANY], 1.0),
            _prefill("bf16, prompt of 512", ours[PREFILL], peer.name, other[PREFILL], 1.0),
        ]
    return rows


def int8(given: Given, limits: Limits) -> list[Row]:
    """Compare a stage in int8 with the limit and llama.cpp's Q8_0."""
    return _integers(given, limits, "int8", "Q8_0", (1.4, 2.0, 4.0))


def int4(given: Given, limits: Limits) -> list[Row]:
    """Compare a stage in int4 with the limit and llama.cpp's Q4_0."""
    return _integers(given, limits, "int4", "Q4_0", (1.0, 1.5, 2.5))


def _integers(
    given: Given, limits: Limits, quantize: str, kind: str, targets: tuple[float, float, float]
) -> list[Row]:
    with ExitStack() as stack:
        own = stack.enter_context(peers.ours(given.folder, quantize, quantize))
        llama = _llama(stack, given, kind)
        found = in_turns([own, *llama], (ONE, MANY, PREFILL), given.rounds)
    ours = _of(found, own.name)
    rows = [_against_limit(f"{quantize}, 1 sequence", ours[ONE], _read_bytes(own), limits, 0.85)]
    for peer in llama:
        other = _of(found, peer.name)
        rows += [
            _decode(f"{quantize}, 1 sequence", ours[ONE], peer.name, other[ONE], targets[0]),
            _decode(f"{quantize}, 16 sequences", ours[MANY], peer.name, other[MANY], targets[1]),
            _prefill(
                f"{quantize}, prompts of 16 x 128", ours[MANY], peer.name, other[MANY], targets[2]
            ),
            _prefill(
                f"{quantize}, prompt of 512", ours[PREFILL], peer.name, other[PREFILL], targets[2]
            ),
        ]
    return rows


def avx2(given: Given, limits: Limits) -> list[Row]:
    """Compare a stage in bfloat16 without AVX-512 with transformers, which has torch's products."""
    few, short = Question(16, 16, 8), Question(1, 128, 4)  # it is slow
    with ExitStack() as stack:
        own = stack.enter_context(peers.ours(given.folder, **peers.AVX2))
        other = stack.enter_context(peers.transformers(given.folder, **peers.AVX2))
        found = in_turns([own, other], (few, short), given.rounds)
    ours, theirs = _of(found, own.name), _of(found, other.name)
    return [
        _prefill("AVX2, bf16, prompt of 128", ours[short], other.name, theirs[short], 3.0),
        _decode("AVX2, bf16, 16 sequences", ours[few], other.name, theirs[few], 3.0),
        _decode("AVX2, bf16, 1 sequence", ours[short], other.name, theirs[short], 1.0),
    ]


def moe(given: Given, limits: Limits) -> list[Row]:
    """Compare layers in the shape of Qwen3-30B-A3B with the limit."""
    folder = make_experts_checkpoint(given.folder.parent / "dllm-qwen3-30b-a3b-shape")
    with peers.ours(folder) as own:
        found = in_turns([own], (ONE, MANY), given.rounds)
    ours = _of(found, own.name)
    one = _experts_bytes(folder, 1)
    return [
        _against_limit("experts, bf16, 1 sequence", ours[ONE], one, limits, 0.75),
        _against_limit(
            "experts, bf16, 16 sequences", ours[MANY], _experts_bytes(folder, 16) / 16, limits, 0.75
        ),
    ]


# ------------------------------------------------------------------ a cluster


def cluster(given: Given, limits: Limits) -> list[Row]:
    """Compare three workers of this machine with one, and with transformers' padded batch."""
    with ExitStack() as stack:
        three = stack.enter_context(ClusterPeer(given.folder, 3))
        one = stack.enter_context(ClusterPeer(given.folder, 1))
        theirs = stack.enter_context(peers.transformers(given.folder))
        found = in_turns([three, one], (ONE,), given.rounds)
        found |= in_turns([three, one, theirs], (BATCH,), given.rounds)
    ours, alone, other = (_of(found, peer.name) for peer in (three, one, theirs))
    return [
        _decode("3 workers, 1 sequence", ours[ONE], one.name, alone[ONE], 0.97),
        _prefill("3 workers, prompt of 128", ours[ONE], one.name, alone[ONE], 0.97),
        _wall("3 workers, 16 requests of 128 + 33", ours[BATCH], one.name, alone[BATCH], 0.97),
        _wall("3 workers, 16 requests of 128 + 33", ours[BATCH], theirs.name, other[BATCH], 1.3),
    ]


# ------------------------------------------------------------------ parts that have own tables


def load(given: Given, limits: Limits) -> list[Row]:
    """Print how fast weights are loaded and made integers, and the memory that it takes."""
    print_loading(given.folder, given.rounds, given.base)
    return []


def profile(given: Given, limits: Limits) -> list[Row]:
    """Print where the time of a decode step goes."""
    print_profile(given.folder)
    return []


# ------------------------------------------------------------------ rows


def _of(found: dict[tuple[str, Question], Times], name: str) -> dict[Question, Times]:
    return {asked: times for (who, asked), times in found.items() if who == name}


def _decode(what: str, ours: Times, name: str, theirs: Times, target: float) -> Row:
    return Row(f"decode, {what}: tokens/s", ours.decode_per_s, name, theirs.decode_per_s, target)


def _prefill(what: str, ours: Times, name: str, theirs: Times, target: float) -> Row:
    return Row(f"prefill, {what}: tokens/s", ours.prefill_per_s, name, theirs.prefill_per_s, target)


def _wall(what: str, ours: Times, name: str, theirs: Times, target: float) -> Row:
    return Row(f"{what}: per s", 16 / ours.wall_s, name, 16 / theirs.wall_s, target)


def _against_limit(what: str, ours: Times, nbytes: float, limits: Limits, target: float) -> Row:
    """Return a row that compares with reading `nbytes` of memory for each token."""
    most = limits.read_bytes_per_s / nbytes
    return Row(f"decode, {what}: tokens/s", ours.decode_per_s, "the bandwidth", most, target)


def _read_bytes(own: Peer) -> int:
    """Return the bytes of weights that one step of one token reads: all but the embedding."""
    return int(own.loaded["weight_bytes"]) - 32_000 * 2048 * 2


def _experts_bytes(folder: Path, tokens: int) -> float:
    """Return the bytes of weights that a step of so many random tokens reads, as is likely."""
    from distributed_llm.common.checkpoint import open_checkpoint
    from distributed_llm.common.types import LayerRange

    checkpoint = open_checkpoint(folder)
    sizes = {t.name: t.nbytes for t in checkpoint.tensors_of(LayerRange(0, checkpoint.num_layers))}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    rest = sum(sizes.values()) - experts - sizes["model.embed_tokens.weight"]
    share = 1 - (1 - 8 / 128) ** tokens  # of experts that some token chooses
    return rest + share * experts


def _llama(stack: ExitStack, given: Given, kind: str) -> list[Peer]:
    """Return llama.cpp with the same weights, unless there is no interpreter that has it."""
    python = given.llama_python
    if python is None:
        return []
    beside = given.folder.parent
    file = gguf_checkpoint(given.folder, beside / f"{given.folder.name}-bf16.gguf")
    if kind != "bf16":
        source, file = file, beside / f"{given.folder.name}-{kind}.gguf"
        if not file.exists():
            made = (str(source), "--quantize", kind, "--output", str(file))
            subprocess.run([python, "benchmarks/llamacpp_peer.py", *made], check=True)
    return [stack.enter_context(peers.llamacpp(python, file))]


# ------------------------------------------------------------------ command line

_PARTS: dict[str, Callable[[Given, Limits], list[Row]]] = {
    "bf16": bf16,
    "int8": int8,
    "int4": int4,
    "cluster": cluster,
    "avx2": avx2,
    "moe": moe,
    "load": load,
    "profile": profile,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="+", choices=_PARTS)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is or shall be")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-python", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--base", type=Path, help="an older checkout of this repository")
    given = parser.parse_args(arguments)
    folder = given.folder or Path(tempfile.gettempdir()) / "dllm-llama-1.1b"
    asked = Given(make_checkpoint(folder), given.rounds, given.llama_python, given.base)
    for part in given.parts:
        limits = measure_limits()
        print_limits(limits)
        rows = _PARTS[part](asked, limits)
        if rows:
            print_table(_HEAD, [row.cells() for row in rows])


if __name__ == "__main__":
    main()
