"""The program `dllm`: from its first line on, Ctrl-C ends it, even in the middle of slow imports.

Python's own way, an exception, is lost when it comes while an object is being deleted. The verbs
that have something to clean up take over from here; see `common/stopping.py`.
"""

import os
import signal


def main() -> None:
    """Run the command line and exit with its code."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in jobs in the background
        signal.signal(signal.SIGINT, _end)
    _open_closed_streams()
    from distributed_llm.cli import main as dllm

    dllm()


def _end(*_: object) -> None:
    os._exit(130)


def _open_closed_streams() -> None:
    """Open the standard streams that are closed, or a socket might get the number of one.

    Reading and writing them goes on to fail, except messages, which go nowhere.
    """
    for number, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # gets the lowest free number, which is this one


if __name__ == "__main__":
    main()
