"""The text process: serves the coordinator that started it over a socket, and ends with it.

In the coordinator itself, a long prompt would leave Python no time for anything else.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import assert_never

from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.coordinator.text.messages import (
    Begun,
    Drop,
    Order,
    Prompt,
    Question,
    Ready,
    Reply,
    Resume,
    Tokens,
    Unpacker,
    Unusable,
    pack,
)
from distributed_llm.coordinator.text.tokenizer import Tokenizer
from distributed_llm.coordinator.text.work import TextWork

_PROMPT_THREADS = 2
"""Prompts that are encoded at the same time, so that a long one does not delay all others."""

_RECEIVE_BYTES = 1 << 18


def main() -> None:
    """Serve a coordinator until it closes the socket.

    The arguments are the socket (see `inherited_socket`), the folder of the tokenizer, and the
    tokens that the model can take.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the coordinator, which ends us
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(format="%(levelname)s text process: %(message)s")
    handle, folder, context_length = sys.argv[1:]
    try:
        _TextProcess(inherited_socket(handle)).run(Path(folder), int(context_length))
    except OSError:  # the coordinator is gone
        pass
    except Exception:
        logging.exception("the text process cannot go on")
        os._exit(1)
    os._exit(0)  # at once: a thread may be busy with a long prompt


def inherited_socket(handle: str) -> socket.socket:
    """Return the socket that the coordinator gave to this process.

    Args:
        handle: its file descriptor; on Windows, what `socket.share` returned, in hexadecimal.
    """
    if sys.platform == "win32":
        return socket.fromshare(bytes.fromhex(sys.stdin.readline()))
    return socket.socket(fileno=int(handle))


class _TextProcess:
    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._sending = threading.Lock()

    def run(self, folder: Path, context_length: int) -> None:
        try:
            tokenizer = Tokenizer.open(folder)
        except DistributedLLMError as exc:
            self._send(Unusable(code=exc.code, message=str(exc)))
            return
        work = TextWork(tokenizer, context_length)
        for _ in range(_PROMPT_THREADS):
            threading.Thread(target=self._encode_prompts, args=(work,), daemon=True).start()
        self._send(Ready(facts=tokenizer.facts()))
        unpacker = Unpacker(Order)
        while data := self._link.recv(_RECEIVE_BYTES):
            for order in unpacker.feed(data):
                self._obey(order, work)

    def _obey(self, order: Order, work: TextWork) -> None:
        match order:
            case Tokens():
                self._send(work.texts(order))
            case Prompt() | Question():
                work.put(order)
            case Drop():
                work.drop(order)
            case Resume():
                if failed := work.resume(order):
                    self._send(failed)
            case _:
                assert_never(order)

    def _encode_prompts(self, work: TextWork) -> None:
        with contextlib.suppress(OSError):
            while True:
                order = work.take()
                self._send(Begun(request=order.request, num_bytes=len(order.payload)))
                self._send(work.do(order))

    def _send(self, reply: Reply) -> None:
        with self._sending:
            self._link.sendall(pack(reply))


if __name__ == "__main__":
    main()
