"""`dllm chat`: a conversation with the model, at a terminal."""

import contextlib
import io
import sys
from typing import Annotated

import typer

from distributed_llm.options import Config, Coordinator, Insecure, client_of, settings_of


def chat(
    coordinator: Coordinator = None,
    config: Config = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of an answer at most.", show_default="the model's, else 256"),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy.", show_default="the model's, else 0")
    ] = None,
    insecure: Insecure = False,
) -> None:
    """Talk with the model; Ctrl-C stops an answer, Ctrl-D ends. /help shows what else there is.

    Where stdin is no terminal, each of its lines is a message.
    """
    settings = settings_of(
        config, {"client.coordinator": coordinator, "client.insecure": insecure or None}
    )
    from distributed_llm import console
    from distributed_llm.chat.repl import Repl

    params = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    is_person = sys.stdin is not None and sys.stdin.isatty()
    terminal = _Terminal(is_person)
    with client_of(settings) as client:
        model = client.model()
        if is_person:
            terminal.note(f"{client.identity().model}; /help shows what there is, Ctrl-D ends.")
        Repl(
            client,
            terminal,
            has_template=bool(model.chat_template),
            params={name: value for name, value in params.items() if value is not None},
            keeps_going=is_person,
            show_stats=lambda generation: console.print_stats([generation]),
        ).run()


class _Terminal:
    """Stdin and stdout; what is no answer goes to stderr.

    Args:
        is_person: whether to ask for lines, with what was typed before behind the arrow keys.
    """

    def __init__(self, is_person: bool) -> None:
        self._is_person = is_person
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # bytes that are no text end no conversation
        if is_person:
            with contextlib.suppress(ImportError):  # on Windows the console has them
                import readline  # noqa: F401 - it gives `input` its keys

    def read(self, prompt: str) -> str:
        """Return the next line."""
        if self._is_person:
            return input(prompt)
        try:
            line = sys.stdin.readline() if sys.stdin else ""
        except OSError:  # it is closed
            line = ""
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def write(self, text: str) -> None:
        """Write a piece of an answer."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Tell what is no answer."""
        typer.secho(text, dim=True, err=True)
