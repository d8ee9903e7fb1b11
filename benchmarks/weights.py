"""Weights on their way to machines that have nothing: how much of the link they use, and the rest.

    sudo python -m benchmarks.weights [--gbit 1] [--rounds 2]

Needs Linux and root: machines are network namespaces, each behind a link of its own that `tc`
limits ("pc" has the model and the coordinator, "mac" and "old" have empty folders and a join line).
mac has a core of its own, the others share one. What the link carries by itself is measured in the
same run, with one TCP connection between the same two namespaces.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import distributed_llm
from benchmarks.common import print_table
from benchmarks.make_checkpoint import make_checkpoint

_BRIDGE = "dllmbr"
_MACHINES = {"pc": "10.77.0.1", "mac": "10.77.0.2", "old": "10.77.0.3"}
_CORES = {"pc": "0", "mac": "1", "old": "0"}
"""The core of each machine: what the others compute does not slow mac down."""

_PORT = 5555
_MODEL = "org/bench"
_COMMIT = "0123456789abcdef" * 2 + "01234567"
_TIMEOUT_S = 180.0
_PLAIN_BYTES = 512 << 20

_started: list[subprocess.Popen[bytes]] = []


def sh(*words: str) -> str:
    """Run a command and return what it prints."""
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def make_snapshot(hub: Path) -> int:
    """Write a model into a cache of the hub, as if it came from there; return its bytes."""
    repository = hub / "hub" / f"models--{_MODEL.replace('/', '--')}"
    snapshot = make_checkpoint(repository / "snapshots" / _COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(_COMMIT)
    for path in (Path(distributed_llm.__file__).parent / "builtin_model").glob("tokenizer*"):
        shutil.copy(path, snapshot)
    return sum(path.stat().st_size for path in snapshot.glob("*.safetensors"))


@contextmanager
def network(gbit: float) -> Iterator[None]:
    """Make the namespaces, and links of `gbit` Gbit/s in each direction between them."""
    try:
        sh("ip", "link", "add", _BRIDGE, "type", "bridge")
        sh("ip", "link", "set", _BRIDGE, "up")
        for name, host in _MACHINES.items():
            outer, inner = f"dllm-{name}", "eth0"
            sh("ip", "netns", "add", f"dllm-{name}")
            sh("ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", outer)
            sh("ip", "link", "set", outer, "master", _BRIDGE, "up")
            within = ("ip", "netns", "exec", outer)
            sh(*within, "ip", "addr", "add", f"{host}/24", "dev", inner)
            sh(*within, "ip", "link", "set", inner, "up")
            sh(*within, "ip", "link", "set", "lo", "up")
            limit = ("rate", f"{gbit}gbit", "burst", "256kb", "latency", "20ms")
            sh("tc", "qdisc", "add", "dev", outer, "root", "tbf", *limit)
            sh(*within, "tc", "qdisc", "add", "dev", inner, "root", "tbf", *limit)
        yield
    finally:
        for process in _started:
            process.kill()
            process.wait()
        for name in _MACHINES:
            with suppress(subprocess.CalledProcessError):
                sh("ip", "netns", "del", f"dllm-{name}")
        with suppress(subprocess.CalledProcessError):
            sh("ip", "link", "del", _BRIDGE)


def received(name: str) -> int:
    """Return the bytes that a machine has received so far."""
    path = f"/sys/class/net/dllm-{name}/statistics/tx_bytes"
    return int(Path(path).read_text())


class Machine:
    """A machine with folders of its own in a network namespace."""

    def __init__(self, name: str, folder: Path, hub: Path | None = None) -> None:
        self.name = name
        self._core = _CORES[name]
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("DLLM_")},
            "DLLM_STATE": str(folder / "state"),
            "DLLM_CACHE": str(folder / "cache"),
            "HF_HOME": str(hub or folder / "hub"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.getcwd(),
        }

    def start(self, *words: str, **settings: str) -> subprocess.Popen[bytes]:
        """Start `dllm` with these words and settings there; its log goes to a file."""
        log = (self.folder / f"{words[0]}.log").open("ab")
        environment = self.environment | settings
        command = self._command(words)
        _started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return _started[-1]

    def ask(self, *words: str) -> str:
        """Run `dllm` with these words there and return what it prints."""
        done = subprocess.run(
            self._command(words), env=self.environment, capture_output=True, text=True, check=False
        )
        return done.stdout

    def forget(self, *what: str) -> None:
        """Delete folders of it."""
        for one in what:
            shutil.rmtree(self.folder / one, ignore_errors=True)

    def _command(self, words: Sequence[str]) -> list[str]:
        dllm = [sys.executable, "-m", "distributed_llm", *words]
        return ["ip", "netns", "exec", f"dllm-{self.name}", "taskset", "-c", self._core, *dllm]


def plain_bytes_per_s() -> float:
    """Return how fast one TCP connection brings bytes from pc to mac."""
    host = _MACHINES["pc"]
    send = (
        "import socket; s = socket.create_server(('0.0.0.0', 7777)); print('up', flush=True)\n"
        f"c, _ = s.accept(); d = bytes(1 << 20)\nfor _ in range({_PLAIN_BYTES >> 20}): c.sendall(d)"
    )
    take = (
        f"import socket, time; c = socket.create_connection(('{host}', 7777)); n = 0\n"
        "b = bytearray(1 << 20); t = time.perf_counter()\n"
        "while (k := c.recv_into(b)): n += k\nprint(n / (time.perf_counter() - t))"
    )
    within = ("ip", "netns", "exec")
    server = subprocess.Popen(
        [*within, "dllm-pc", sys.executable, "-c", send], stdout=subprocess.PIPE
    )
    assert server.stdout is not None
    server.stdout.readline()
    rate = float(sh(*within, "dllm-mac", sys.executable, "-c", take))
    server.wait()
    return rate


def stop(*processes: subprocess.Popen[bytes]) -> None:
    """End processes."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Arrival:
    """Watches what a machine receives; used as a context."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._over = threading.Event()
        self._seen: list[tuple[float, int]] = []
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Arrival":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self._seen.append((time.perf_counter(), received(self._name)))

    @property
    def began(self) -> bool:
        """Whether more than a MB has come."""
        return bool(self._seen) and self._seen[-1][1] - self._seen[0][1] > 1e6

    @property
    def nbytes(self) -> int:
        """Bytes that came in all."""
        return self._seen[-1][1] - self._seen[0][1]

    @property
    def bytes_per_s(self) -> float:
        """How fast the bytes came, but for the first and the last tenth of them."""
        first, last = self._seen[0][1], self._seen[-1][1]
        low, high = first + 0.1 * (last - first), first + 0.9 * (last - first)
        begin = next(one for one in self._seen if one[1] >= low)
        end = next(one for one in self._seen if one[1] >= high)
        return (end[1] - begin[1]) / (end[0] - begin[0])

    @property
    def longest_pause_s(self) -> float:
        """The longest time without a byte between the first and the last tenth of them."""
        first, last = self._seen[0][1], self._seen[-1][1]
        low, high = first + 0.1 * (last - first), first + 0.9 * (last - first)
        longest, since = 0.0, None
        before = 0
        for at, nbytes in self._seen:
            if low <= nbytes <= high:
                if since is None or nbytes - before > 4096:
                    since = at
                longest = max(longest, at - since)
            before = nbytes
        return longest


def gaps(pc: Machine, tokens: int) -> list[float]:
    """Return the times between the tokens of one answer, seconds, as a client sees them."""
    code = (
        "import sys, time\nfrom distributed_llm import DistributedClient\n"
        f"with DistributedClient('127.0.0.1:{_PORT}') as client:\n"
        "    times = []\n"
        f"    for chunk in client.stream([1, 2, 3, 4], max_new_tokens={tokens}, ignore_eos=True):\n"
        "        times.append(time.perf_counter())\n"
        "print(*(b - a for a, b in zip(times, times[1:])))"
    )
    within = ["ip", "netns", "exec", f"dllm-{pc.name}", sys.executable, "-c", code]
    done = subprocess.run(within, env=pc.environment, capture_output=True, text=True, check=True)
    return [float(one) for one in done.stdout.split()]


def gap_text(times: Sequence[float]) -> str:
    """Return the median and the longest of times between tokens."""
    return f"{1e3 * statistics.median(times):.0f} ms, {1e3 * max(times):.0f} ms"


def wait_for_state(pc: Machine, workers: Sequence[str], state: str) -> None:
    """Return once all of these workers are in a state.

    Raises:
        TimeoutError: they are not, in time.
    """
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        text = pc.ask("status", "--json")
        if text:
            held = {one["name"]: one["state"] for one in json.loads(text)["workers"]}
            if all(held.get(name) == state for name in workers):
                return
        time.sleep(0.2)
    raise TimeoutError(f"{workers} are not {state}")


def join_line(pc: Machine, bare: Machine) -> str:
    """Have a machine be new, and return a line that enrols it."""
    bare.forget("state", "cache", "hub")
    pc.ask("machines", "remove", bare.name)
    found = re.search(r"dllm://\S+", pc.ask("token", "create", "--role", "worker"))
    assert found is not None
    return found[0].replace("127.0.0.1", _MACHINES["pc"])


def first_answer_s(pc: Machine, mac: Machine) -> tuple[float, Arrival, subprocess.Popen[bytes]]:
    """Return the time from the join of a bare machine to the first answer, and what it received."""
    line = join_line(pc, mac)
    began = time.perf_counter()
    with Arrival(mac.name) as arrival:
        worker = mac.start("join", line, "--name", mac.name, "--threads", "1")
        wait_for_state(pc, [mac.name], "serving")
    pc.ask("generate", "Once upon a time", "--max-new-tokens", "1")
    return time.perf_counter() - began, arrival, worker


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gbit", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("tc"):
        raise SystemExit("This needs root, and the commands ip and tc, to make networks.")
    folder = Path(tempfile.mkdtemp(prefix="dllm-weights-"))
    try:
        hub = folder / "hub"
        nbytes = make_snapshot(hub)
        with network(given.gbit):
            measure(folder, hub, nbytes, given)
    except Exception:
        for log in folder.glob("*/*.log"):
            print(f"{log}:\n{log.read_text()[-2000:]}", file=sys.stderr)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(folder: Path, hub: Path, nbytes: int, given: argparse.Namespace) -> None:
    """Measure everything once the network is there."""
    pc = Machine("pc", folder / "pc", hub)
    mac, old = Machine("mac", folder / "mac"), Machine("old", folder / "old")
    coordinator = pc.start(
        *("coordinator", _MODEL, "--bind", f"0.0.0.0:{_PORT}"), DLLM_COORDINATOR__REPLICAS="2"
    )
    deadline = time.monotonic() + 60
    while not pc.ask("status", "--json") and time.monotonic() < deadline:
        time.sleep(0.2)
    rows: list[list[str]] = []
    plain, fetched, firsts = [], [], []
    for _ in range(given.rounds):
        plain.append(plain_bytes_per_s())
        seconds, arrival, worker = first_answer_s(pc, mac)
        firsts.append(seconds)
        fetched.append(arrival.bytes_per_s)
        with Arrival("mac") as again:
            stop(worker)
            began = time.perf_counter()
            worker = mac.start("join", "--name", "mac", "--threads", "1")
            wait_for_state(pc, ["mac"], "serving")
            again_s = time.perf_counter() - began
        stop(worker)
    link, rate = statistics.median(plain), statistics.median(fetched)
    rows += [
        ["model", f"{nbytes / 1e6:.0f} MB"],
        ["one TCP connection over the link", f"{link / 1e6:.1f} MB/s"],
        ["weights over the link", f"{rate / 1e6:.1f} MB/s ({rate / link:.2f} of that)"],
        ["bare machine, join to first answer", f"{statistics.median(firsts):.1f} s"],
        ["the bytes alone, at the link's rate", f"{nbytes / link:.1f} s"],
        ["same machine again: received", f"{again.nbytes / 1e6:.1f} MB in {again_s:.1f} s"],
    ]
    rows += two_sources(pc, mac, old, nbytes, link)
    stop(coordinator)
    print_table(("what", "measured"), rows)


def two_sources(
    pc: Machine, mac: Machine, old: Machine, nbytes: int, link: float
) -> list[list[str]]:
    """Measure a third machine that gets weights of two others, of which one is killed half-way."""
    _, _, worker = first_answer_s(pc, mac)
    usual = gaps(pc, 60)
    line = join_line(pc, old)
    with Arrival("old") as arrival:
        third = old.start("join", line, "--name", "old", "--threads", "1")
        while received("old") == 0 or not arrival.began:
            time.sleep(0.05)
        during = gaps(pc, 60)
        still = arrival.nbytes < nbytes
        wait_for_state(pc, ["old"], "serving")
    stop(third)
    rows = [
        ["inter-token time, nothing else: median, longest", gap_text(usual)],
        ["... while weights pass" + ("" if still else ", and after"), gap_text(during)],
    ]
    line = join_line(pc, old)
    with Arrival("old") as arrival:
        third = old.start("join", line, "--name", "old", "--threads", "1")
        start = received("old")
        while received("old") - start < 0.5 * nbytes:
            time.sleep(0.02)
        worker.kill()
        worker.wait()
        wait_for_state(pc, ["old"], "serving")
    stop(third)
    return [
        *rows,
        ["a source killed half-way: longest pause", f"{arrival.longest_pause_s:.2f} s"],
        ["... and the rate until the end", f"{arrival.bytes_per_s / link:.2f} of the link"],
    ]


if __name__ == "__main__":
    main()
