"""Compare the kernels of this machine for the weights of a 1.1 B Llama, in turns in one run.

    python -m benchmarks.kernels

Every product uses another copy of the weight than the one before, so that each is read from memory,
as in a model. Times are the least of several rounds. "chosen" is what a worker would use, were it
to measure weights of this shape.
"""

import argparse
import math

import torch

from distributed_llm.worker.model.kernels.choice import ROWS, Form, Kind, fastest, size_of
from distributed_llm.worker.model.kernels.measuring import seconds_of

SHAPES = {"q, o": (2048, 2048), "k, v": (256, 2048), "gate, up": (5632, 2048), "down": (2048, 5632)}
KINDS: tuple[tuple[Form, str], ...] = (
    ("float", "bfloat16"),
    ("float", "float32"),
    ("int8", ""),
    ("int4", ""),
)


def run() -> None:
    """Measure and print."""
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}\n"
    )
    rows = " | ".join(f"{rows} rows, ms" for rows in ROWS)
    print(f"| weight | form | order | kernel | {rows} |\n|{'---|' * (4 + len(ROWS))}")
    for name, (channels, inputs) in SHAPES.items():
        for form, dtype in KINDS:
            kind = Kind(form, dtype, size_of(channels * inputs))
            seconds = seconds_of(kind, (channels, inputs), patience=math.inf)
            choice = fastest(seconds)
            for (order, kernel), times in seconds.items():
                shown = [
                    f"{taken * 1e3:.2f}"
                    + (" chosen" if choice and choice.order == order and kernel == best else "")
                    for taken, best in zip(times, choice.kernels if choice else (), strict=True)
                ]
                weight = f"{name} [{channels}, {inputs}]"
                print(f"| {weight} | {kind} | {order} | {kernel} | {' | '.join(shown)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    with torch.inference_mode():
        run()
