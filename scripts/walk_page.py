"""Walks through the page in a browser: over a made-up cluster, then over a real one that changes.

`make web` runs this. It needs what `npm ci` installs in `web/`, and Chromium.

    python scripts/walk_page.py [--only mock|real]
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from distributed_llm import DistributedClient, LocalCluster
from distributed_llm.client.new_key import create_key
from distributed_llm.common.keyring import STATE_VARIABLE
from distributed_llm.common.roles import Role
from distributed_llm.local_process import LocalProcess

WEB = Path(__file__).parents[1] / "web"
LIMIT_S = 300.0
PROMPT = "Once upon a time"
WATCHED_S = 5.0
"""Time for which the page is watched before something happens to the cluster, seconds."""


def walk(url: str, key: str, *parts: str, meanwhile: Callable[[], None] | None = None) -> None:
    """Drive the page through some parts; fail if anything there is wrong.

    Args:
        meanwhile: called once the page has been open for a while.
    """
    command = ["node", "e2e/page.mjs", url, key, *parts]
    with subprocess.Popen(command, cwd=WEB) as browser:
        try:
            if meanwhile:
                time.sleep(WATCHED_S)
                meanwhile()
            if browser.wait(LIMIT_S):
                sys.exit(f"the walk through {', '.join(parts) or 'the page'} failed")
        finally:
            browser.kill()


def over_a_made_up_cluster() -> None:
    """Walk through all that the page can show."""
    command = ["node", "mock/server.mjs", "0"]
    with subprocess.Popen(command, cwd=WEB, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            url = next(word for word in server.stdout.readline().split() if "http" in word)
            walk(url.partition("/#")[0], "admin-key", "mock")
        finally:
            server.kill()


def over_a_real_cluster() -> None:
    """Walk through the page of a cluster whose machines die, join and leave under a request."""
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(
            "", workers=3, coordinator={"dtype": "float32", "strategy": "even"}
        ) as cluster,
        DistributedClient(cluster.address) as client,
    ):
        command = ("api", "--coordinator", cluster.address, "--bind", "127.0.0.1:0")
        api = LocalProcess("api", command, {}, Path(folder) / "api.log")
        try:
            url = api.stdout.readline().decode().strip()
            key = asyncio.run(create_key(cluster.address, "walker", Role.ADMIN, timeout_s=30)).text
            walk(url, key)
            asked = {"max_new_tokens": 400, "temperature": 0.0, "ignore_eos": True}
            alone = client.generate(PROMPT, **asked)

            def generate_and(change: Callable[[], object]) -> Callable[[], None]:
                def both() -> None:
                    answers: list[str] = []
                    asking = threading.Thread(
                        target=lambda: answers.append(client.generate(PROMPT, **asked))
                    )
                    asking.start()
                    change()
                    asking.join(LIMIT_S)
                    assert answers == [alone], "an answer changed or was lost"

                return both

            serving = next(one for one in client.status().workers if one.layers)
            number = [worker.name for worker in cluster.workers].index(serving.name)
            walk(url, key, "gone", meanwhile=generate_and(cluster.workers[number].kill))
            walk(
                url,
                key,
                "joined",
                meanwhile=generate_and(lambda: cluster.add_worker(name="late")),
            )
            walk(url, key, "drain")
        finally:
            api.close()


def main() -> None:
    """Walk as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("mock", "real"))
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as state:
        os.environ[STATE_VARIABLE] = state  # keys made here are nobody's
        if only != "real":
            over_a_made_up_cluster()
        if only != "mock":
            over_a_real_cluster()


if __name__ == "__main__":
    main()
