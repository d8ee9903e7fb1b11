"""Find the settings of a coordinator that are fastest on your machines, by measuring.

    python benchmark.py --quick                              # workers on this machine, 2-3 minutes
    python benchmark.py --listen 0.0.0.0:5555 --workers 3    # real machines; workers join here
    python benchmark.py --simulate config/clusters/mixed.yaml   # machines that one does not have

It ends with a table, with what is best for latency and for throughput and why, with
`config/tuned.yaml` for `dllm coordinator --config`, and with a report `config/tuned.html`.

Exit codes are those of `dllm`: 0 ok, 1 failed, 2 wrong usage, settings or model, 3 the other end
cannot be reached, 4 not enough capacity, 130 interrupted.
"""

import sys
from importlib.util import find_spec

_NEEDED = ("torch", "zmq", "typer", "matplotlib")


def _run() -> int:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"Error (config): {', '.join(missing)} cannot be imported by this Python. Set up with "
            "`make install` and use .venv/bin/python, or install with: pip install -e '.[tune]'",
            file=sys.stderr,
        )
        return 2
    from benchmarks.tuning.command import main

    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(_run())
