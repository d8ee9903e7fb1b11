"""How long a local cluster takes from the call to serving, against another checkout.

    python -m benchmarks.startup [--against FOLDER] [--rounds 5]

Each round is a program of its own, as a user would write it: three workers with the built-in model.
The other checkout needs its own .venv. Programs of the two take turns; medians are printed.
"""

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path

from benchmarks.common import print_table

_ROOT = Path(__file__).parents[1]

_PROGRAM = """
import json, time
begun = time.perf_counter()
from distributed_llm import DistributedClient, LocalCluster
imported = time.perf_counter()
with LocalCluster(model="", workers=3) as cluster:
    serving = time.perf_counter()
    with DistributedClient(cluster.address) as client:
        client.generate("Once upon a time", max_new_tokens=1)
    answered = time.perf_counter()
print(json.dumps([imported - begun, serving - imported, answered - serving]))
"""
_ROWS = ("import of the package", "from the call to serving", "first answer")


def measure(folder: Path) -> list[float]:
    """Return the seconds of each row for a checkout."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    python = folder / ".venv" / "bin" / "python"
    done = subprocess.run(
        [str(python), "-c", _PROGRAM], cwd=folder, env=environment, capture_output=True, check=True
    )
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout, with a .venv")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folders = [_ROOT, *([args.against.resolve()] if args.against else [])]
    rounds: list[list[list[float]]] = [[] for _ in folders]
    for _ in range(args.rounds):
        for found, folder in zip(rounds, folders, strict=True):
            found.append(measure(folder))
    head = ["seconds, median", "this", *(["other", "ratio"] if args.against else [])]
    rows = []
    for number, name in enumerate(_ROWS):
        medians = [statistics.median(each[number] for each in found) for found in rounds]
        ratio = [f"{medians[0] / medians[1]:.2f}"] if args.against else []
        rows.append([name, *(f"{median:.2f}" for median in medians), *ratio])
    print_table(head, rows)


if __name__ == "__main__":
    main()
