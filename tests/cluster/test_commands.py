"""The `dllm` command as people use it, rightly and wrongly: output, messages, exit codes."""

import asyncio
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from distributed_llm import CheckpointError, DistributedClient, LocalCluster, UnsupportedModel
from distributed_llm.cli import app
from distributed_llm.common.errors import ConfigError, NotEnoughMemory
from distributed_llm.common.keyring import state_folder
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.messages import PROTOCOL_VERSION
from distributed_llm.common.transport import Router
from distributed_llm.common.types import PeerId
from distributed_llm.common.units import split_address
from distributed_llm.coordinator.trust.store import Trust
from tests.reference import reference_text
from tests.waiting import eventually
from tests.warm import failed_worker

COMMAND = [sys.executable, "-m", "distributed_llm"]
LATER_VERSION = PROTOCOL_VERSION + 1
LIMIT_S = 60


def dllm(
    *arguments: str, stdin: str = "", **environment: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, **environment},
        check=False,
    )


def plan(*arguments: str) -> Result:
    """Run `dllm plan` in this process, which has loaded torch: a process of its own takes seconds.

    Raises:
        DistributedLLMError: what `dllm` would print before it exits.
    """
    environment = {"DLLM_COORDINATOR__REPLICAS": "1"}
    return CliRunner().invoke(app, ["plan", *arguments], env=environment, catch_exceptions=False)


def start(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# ------------------------------------------------------------------ used rightly


def test_generate_prints_the_text_and_nothing_else(cluster: LocalCluster, checkpoint: Path) -> None:
    done = dllm(
        *("generate", "--coordinator", cluster.address, "The quick brown"),
        *("--max-new-tokens", "20", "--temperature", "0", "--ignore-eos"),
    )
    assert done.stdout == reference_text(checkpoint, "The quick brown", 20) + "\n"
    assert (done.returncode, done.stderr) == (0, "")


def test_generate_reads_stdin_and_tells_who_ran_what(cluster: LocalCluster) -> None:
    done = dllm(
        *("generate", "--coordinator", cluster.address, "--max-new-tokens", "5", "--stats"),
        stdin="The quick brown",
    )
    assert done.returncode == 0
    assert all(f"worker-{i}" in done.stderr for i in (1, 2, 3))
    assert "worker-1" not in done.stdout


def test_generate_prints_json(cluster: LocalCluster) -> None:
    done = dllm(
        *("generate", "--coordinator", cluster.address, "Hi", "--max-new-tokens", "5", "--json"),
        "--ignore-eos",
    )
    answer = json.loads(done.stdout)
    assert len(answer["token_ids"]) == answer["usage"]["completion_tokens"] == 5
    assert answer["finish_reason"] == "length"


def test_the_coordinator_may_be_named_in_the_environment(cluster: LocalCluster) -> None:
    done = dllm("status", "--json", DLLM_CLIENT__COORDINATOR=cluster.address)
    status = json.loads(done.stdout)
    assert status["state"] == "serving"
    assert len(status["workers"]) == 3


def test_status_shows_every_worker(cluster: LocalCluster) -> None:
    done = dllm("status", "--coordinator", cluster.address)
    assert done.returncode == 0
    assert all(f"worker-{i}" in done.stdout for i in (1, 2, 3))
    assert "serving" in done.stdout
    assert "…" not in done.stdout, "something was cut"


def test_plan_shows_who_would_get_what(checkpoint: Path) -> None:
    done = plan(str(checkpoint), "--worker", "pc=13MiB", "--worker", "12MiB", "--json")
    assert done.exit_code == 0, done.stderr
    stages = json.loads(done.stdout)["stages"]
    assert [stage["worker"] for stage in stages] == ["worker-2", "pc"]
    assert stages[0]["layers"]["start"] == 0
    assert stages[-1]["layers"]["stop"] == 6


def test_a_plan_needs_no_more_than_a_config(checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_bytes((checkpoint / "config.json").read_bytes())
    workers = ["--worker", "pc=13MiB", "--worker", "12MiB"]
    *planned, assumed = plan(str(config), *workers).stdout.splitlines()
    assert assumed.startswith("assumed: weights as config.json describes them; ")
    *with_weights, _ = plan(str(checkpoint), *workers).stdout.splitlines()
    assert planned == with_weights
    code, said = failure("coordinator", str(tmp_path), "--bind", "127.0.0.1:0")
    assert code == 2
    assert "no weights" in said


def test_plan_shows_what_each_machine_is_worth(checkpoint: Path) -> None:
    asked = [str(checkpoint), "--objective", "latency"]
    for worker in ("pc=16MiB,40MB/s,1GFLOPS", "mac=16MiB,20MB/s,1GFLOPS", "pi=20KiB,1MB/s,1GFLOPS"):
        asked += ["--worker", worker]
    done = plan(*asked)
    assert (done.exit_code, done.stderr) == (0, "")
    header, pc, weights, memory, idle, expected, worth, *others, assumed = done.stdout.splitlines()
    assert header.split()[:3] == ["worker", "layers", "memory"]
    assert pc.split()[:4] == ["pc", "1-6", "16.0", "MiB"]
    assert weights.endswith("; float32 in the files and in memory")
    assert memory == "memory: 9.6 MiB of each machine are kept for what it computes with"
    assert idle == "without layers: mac and pi"
    assert re.fullmatch(
        r"expected: [\d.]+ tokens/s for one request, [\d.]+ tokens/s for 16 at once", expected
    )
    assert worth.startswith("pc: serves all 6 layers; ")
    assert re.match(r"mac: left out: .* without: the model runs fastest on pc alone$", others[0])
    assert re.search(
        r"^pi: left out: too little memory for one layer \(.* needed, 0 bytes offered, ", others[1]
    )
    assert others[1].endswith(", beside 9.6 MiB that it computes with)")
    assert assumed == "assumed: links of 1 Gbit/s and 0.5 ms"
    document = json.loads(plan(*asked, "--json").stdout)
    assert [stage["worker"] for stage in document["stages"]] == ["pc"]
    assert document["workers"]["pi"]["memory_bytes"] == 20 * 1024
    assert document["workers"]["pi"]["advice"]["gain"] == 0.0
    assert document["many_tokens_per_s"] > document["one_tokens_per_s"] > 0


def test_a_worker_is_drained_while_a_request_runs(checkpoint: Path) -> None:
    with (
        LocalCluster(
            checkpoint, workers=[{"slowdown": 20.0}] * 2, coordinator={"replicas": 1}
        ) as cluster,
        DistributedClient(cluster.address) as client,
    ):
        asked = {"max_new_tokens": 200, "ignore_eos": True, "temperature": 0.0}
        expected = reference_text(checkpoint, "The quick brown", 200)
        stream = client.stream("The quick brown", **asked)
        texts = [next(stream).text]
        done = dllm("drain", "worker-1", "--coordinator", cluster.address)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "worker-1 has left, and others serve its layers\n"
        status = client.status()
        (left,) = status.workers
        assert (left.name, left.state) == ("worker-2", "serving")
        assert status.answers_running + status.answers_waiting == 1
        computed = status.tokens_generated
        while client.status().tokens_generated < computed + 20:  # by the one that is left
            texts.append(next(stream).text)
        stream.close()  # type: ignore[attr-defined]
        assert expected.startswith("".join(texts))


def test_help_and_version() -> None:
    assert "coordinator" in dllm("--help").stdout
    assert re.match(r"dllm \d+\.\d+", dllm("--version").stdout)


# ------------------------------------------------------------------ used wrongly


def failure(*arguments: str, **environment: str) -> tuple[int, str]:
    done = dllm(*arguments, **environment)
    assert "Traceback" not in done.stderr
    return done.returncode, " ".join(done.stderr.split())


def test_a_plan_that_does_not_fit_says_what_is_missing(checkpoint: Path) -> None:
    said = (
        r"needs .*offer 300.0 KiB .*, beside 9.6 MiB each.*missing.*layers would fit.*Add a worker"
    )
    with pytest.raises(NotEnoughMemory, match=said):
        plan(str(checkpoint), "--worker", "9912KiB", "--worker", "10012KiB")


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        (["pc=1GiB,40GB/s", "mac=1GiB"], "mac=1GiB: it has no speed, but pc=1GiB,40GB/s has one"),
        (["pc=1GiB", "pc=2GiB"], "--worker pc: there are two of this name"),
        (["pc=1GiB,40GB"], "not a bandwidth; write a size per second, such as 40GB/s"),
        (["pc=1GiB,40GB/s,2"], "not a speed; write floating point operations per second"),
        (["pc=1GiB,40GB/s,2TFLOPS,3"], "write [NAME=]SIZE[+ram:RAM][+DISK][,BANDWIDTH[,FLOPS]]"),
        (["pc="], "write [NAME=]SIZE[+ram:RAM][+DISK][,BANDWIDTH[,FLOPS]]"),
        (["my pc=1GiB"], "'my pc' cannot be a worker's name"),
        (["pc=much"], "not a size"),
        (["pc=1GiB+ram:much"], "not a size"),
    ],
)
def test_workers_of_a_plan_that_cannot_be_read(workers: list[str], said: str) -> None:
    options = [text for worker in workers for text in ("--worker", worker)]
    with pytest.raises(ConfigError, match=re.escape(said)):
        plan("", *options)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("a=1-4,b=5-7", "there is no layer 7. Name a worker for every layer."),
        ("a=1-4,b=5", "nobody serves layer 6. Name a worker for every layer."),
    ],
)
def test_a_layer_map_that_does_not_suit_the_model_is_refused_at_start(
    checkpoint: Path, layers: str, said: str
) -> None:
    asked = ["coordinator", str(checkpoint), "--strategy", "custom", "--bind", "127.0.0.1:0"]
    code, error = failure(*asked, DLLM_COORDINATOR__LAYERS=layers)
    assert code == 2
    assert said in error


def test_an_objective_that_there_is_not() -> None:
    code, said = failure("plan", "", "--worker", "1GiB", "--objective", "speed")
    assert code == 2
    assert "objective" in said
    code, said = failure("coordinator", "--objective", "speed")
    assert code == 2
    assert "throughput" in said


def test_draining_who_cannot_leave(cluster: LocalCluster, unused_port: int) -> None:
    code, said = failure("drain", "nobody", "--coordinator", cluster.address)
    assert code == 2
    assert "There is no worker 'nobody'. Workers: worker-1, worker-2, worker-3." in said
    code, said = failure(
        *("drain", "pc", "--coordinator", f"127.0.0.1:{unused_port}"),
        DLLM_CLIENT__CONNECT_TIMEOUT_S="0.5",
    )
    assert code == 3
    assert "nothing listens there" in said


def test_draining_the_only_worker(checkpoint: Path) -> None:
    with (
        LocalCluster(checkpoint, workers=1) as cluster,
        DistributedClient(cluster.address) as client,
    ):
        assert failure("drain", "worker-1", "--coordinator", cluster.address)[0] == 4
        assert client.generate("Hi", max_new_tokens=3, details=True).token_ids


def test_wrong_words() -> None:
    assert failure("generat")[0] == 2
    assert failure("worker", "--threds", "1")[0] == 2
    code, said = failure("worker", "--threads", "-1")
    assert code == 2
    assert "threads" in said
    code, said = failure("status", DLLM_CLIENT__CORDINATOR="x")
    assert code == 2
    assert "DLLM_CLIENT__COORDINATOR" in said


def test_nobody_at_the_address(unused_port: int) -> None:
    address = f"127.0.0.1:{unused_port}"
    code, said = failure(
        "generate", "Hi", "--coordinator", address, DLLM_CLIENT__CONNECT_TIMEOUT_S="0.5"
    )
    assert code == 3
    assert "nothing listens there" in said
    code, said = failure("worker", "--coordinator", address, DLLM_WORKER__CONNECT_TIMEOUT_S="0.5")
    assert code == 3
    assert "nothing listens there" in said


@pytest.fixture
def web_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_something_else_at_the_address(web_server: str) -> None:
    asked = ("status", "--coordinator", web_server)
    code, said = failure(*asked, DLLM_CLIENT__CONNECT_TIMEOUT_S="0.5")
    assert code == 3
    assert f"This machine has no key for the coordinator at {web_server}. " in said
    code, said = failure(*asked, "--insecure", DLLM_CLIENT__CONNECT_TIMEOUT_S="0.5")
    assert code == 3
    assert "it is another program, or a coordinator that stands still" in said


def test_a_port_that_is_taken(cluster: LocalCluster, checkpoint: Path) -> None:
    code, said = failure("coordinator", str(checkpoint), "--bind", cluster.address)
    assert code == 2
    assert "in use" in said
    assert "--bind" in said


@pytest.mark.parametrize("verb", ["coordinator", "plan"])
def test_a_model_that_is_not_there(verb: str, tmp_path: Path) -> None:
    more = ["--worker", "1GiB"] if verb == "plan" else []
    code, said = failure(verb, str(tmp_path / "nowhere"), *more)
    assert code == 2
    assert "nowhere" in said


def test_models_that_cannot_be_read(checkpoint: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for path in checkpoint.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    cut = broken("cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    pickled = broken("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    code_inside = broken("code")
    config = json.loads((code_inside / "config.json").read_text())
    (code_inside / "config.json").write_text(
        json.dumps({**config, "model_type": "nonesuch", "auto_map": {"A": "b.C"}})
    )
    unfit = broken("unfit")
    config = json.loads((unfit / "config.json").read_text())
    (unfit / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    for folder, said in (
        (cut, "not a whole safetensors file"),
        (pickled, "a pickle"),
        (code_inside, "never run"),
        (unfit, "config.json is that of another model"),
    ):
        code, text = failure("coordinator", str(folder), "--bind", "127.0.0.1:0")
        assert code == 2, text
        assert said in text


def test_an_architecture_that_cannot_be_split_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "xlnet", "n_layer": 2}')
    save_file({"h.0.w": torch.zeros(1), "h.1.w": torch.zeros(1)}, tmp_path / "model.safetensors")
    code, said = failure("coordinator", str(tmp_path), "--bind", "127.0.0.1:0")
    assert code == 2
    assert "code of its own" in said
    with pytest.raises(UnsupportedModel, match="code of its own"):
        LocalCluster(tmp_path).start()


def test_an_architecture_that_nobody_knows_is_refused_at_the_start(
    checkpoint: Path, tmp_path: Path
) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    with pytest.raises(UnsupportedModel, match="does not know the model type 'nonesuch'"):
        LocalCluster(tmp_path, workers=1).start()


def test_a_local_cluster_raises_what_its_processes_say(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        LocalCluster(tmp_path / "nowhere" / "at" / "all").start()


# ------------------------------------------------------------------ who does not belong


def test_a_worker_with_other_weights_is_told_and_the_others_serve(
    cluster: LocalCluster, checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in checkpoint.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    weights = load_file(other / "model.safetensors")
    save_file({name: w + 0.01 for name, w in weights.items()}, other / "model.safetensors")
    with LocalCluster(checkpoint, workers=1) as small:
        asked = ("--coordinator", small.address, "--name", "wrong", "--model", str(other))
        code, said = failed_worker(tmp_path / "log", *asked)
        assert code == 2
        assert "not those of the coordinator" in said
        small.wait_until_serving(num_workers=1)
        with DistributedClient(small.address) as client:
            assert client.generate("Hi", max_new_tokens=3, details=True).token_ids


def test_a_worker_is_told_of_a_coordinator_of_another_protocol_version(tmp_path: Path) -> None:
    """The coordinator of a later release is played by this process."""

    async def serve_later_version() -> tuple[int, str]:
        def answer(peer: PeerId, key: PublicKey, frames: object) -> None:
            router.send(peer, [b"DLLM" + bytes([LATER_VERSION]), b"\x80"])

        trust = Trust(state_folder(), 0, now=0.0)
        router = Router("127.0.0.1:0", answer, lambda: None, door=trust.door)
        trust.listening(split_address(router.address)[1])
        try:
            return await asyncio.to_thread(
                failed_worker, tmp_path / "log", "--coordinator", router.address
            )
        finally:
            router.close()
            trust.close()

    code, said = asyncio.run(asyncio.wait_for(serve_later_version(), LIMIT_S))
    assert code == 3
    assert f"version {LATER_VERSION}, this program version {PROTOCOL_VERSION}" in said


# ------------------------------------------------------------------ Ctrl-C


def interrupt(process: "subprocess.Popen[str]") -> tuple[int, str]:
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=LIMIT_S)
    return process.returncode, said


def test_ctrl_c_ends_every_verb_cleanly(checkpoint: Path) -> None:
    with ExitStack() as stack:

        def started(*arguments: str) -> "subprocess.Popen[str]":
            process = stack.enter_context(start(*arguments))
            stack.callback(process.kill)
            return process

        coordinator = started("coordinator", str(checkpoint), "--bind", "127.0.0.1:0")
        assert coordinator.stdout is not None
        address = coordinator.stdout.readline().strip()
        worker = started("worker", "--coordinator", address, "--slowdown", "50")
        client = stack.enter_context(DistributedClient(address))
        eventually(lambda: client.status().state == "serving")
        writer = started(
            *("generate", "Hi", "--coordinator", address, "--max-new-tokens", "200"),
            *("--ignore-eos", "--temperature", "0"),
        )
        eventually(lambda: client.status().answers_running == 1)
        assert interrupt(writer) == (130, "")
        eventually(lambda: client.status().answers_running == 0)
        for process in (worker, coordinator):
            code, said = interrupt(process)
            assert code == 130
            assert "Traceback" not in said
