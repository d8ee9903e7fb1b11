"""The loop of a chat: reads, asks, writes the answer as it comes."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Protocol

from distributed_llm.chat.conversation import Conversation
from distributed_llm.chat.inputs import FENCE, Command, Input, Reader, Say
from distributed_llm.client.answers import Chunk, Generation
from distributed_llm.common.errors import DistributedLLMError

HELP = f"""\
/regenerate    answer the last message once more
/system TEXT   tell the model what to be; without TEXT, show what it was told
/clear         begin anew
/stats         show who computed the last answer, and how fast
/help          show this
/exit          end; so does Ctrl-D
{FENCE}            begins a message of several lines, and ends it
Ctrl-C         stops an answer"""

_NO_TEMPLATE = (
    "This model has no chat template: it was not made for conversations. It goes on from what you "
    "write instead."
)


class Asked(Protocol):
    """Who is asked; a `DistributedClient`."""

    def stream(self, prompt: str, **params: Any) -> Iterator[Chunk]:
        """Return the pieces in which a text goes on."""

    def stream_chat(self, messages: list[dict[str, Any]], **params: Any) -> Iterator[Chunk]:
        """Return the pieces of an answer."""


class Terminal(Protocol):
    """Where a person sits, or another program."""

    def read(self, prompt: str) -> str:
        """Return the next line.

        Raises:
            EOFError: there are no more.
            KeyboardInterrupt: Ctrl-C.
        """

    def write(self, text: str) -> None:
        """Write a piece of an answer."""

    def note(self, text: str) -> None:
        """Tell what is no answer."""


class Repl:
    """A chat.

    Args:
        client: who is asked.
        has_template: whether the model takes conversations.
        params: of each answer, as clients take them.
        keeps_going: whether a failure is told and the chat goes on, as it does with a person.
        show_stats: shows who computed an answer.
    """

    def __init__(
        self,
        client: Asked,
        terminal: Terminal,
        *,
        has_template: bool,
        params: Mapping[str, Any],
        keeps_going: bool,
        show_stats: Callable[[Generation], None],
    ) -> None:
        self._client = client
        self._terminal = terminal
        self._has_template = has_template
        self._params = params
        self._keeps_going = keeps_going
        self._show_stats = show_stats
        self._conversation = Conversation()
        self._last: Generation | None = None

    def run(self) -> None:
        """Chat until there are no more lines, or `/exit`.

        Raises:
            DistributedLLMError: an answer failed, and this does not keep going.
        """
        if not self._has_template:
            self._terminal.note(_NO_TEMPLATE)
        for one in self._inputs():
            match one:
                case Say(text=text):
                    self._say(text)
                case Command(name="exit" | "quit" | "bye"):
                    return
                case Command(name=name, argument=argument):
                    self._obey(name, argument)

    def _inputs(self) -> Iterator[Input]:
        reader = Reader()
        while True:
            try:
                line = self._terminal.read("... " if reader.is_within else ">>> ")
            except KeyboardInterrupt:
                reader.give_up()
                self._terminal.note("\n(Ctrl-D or /exit ends.)")
                continue
            except EOFError:
                if last := reader.end():
                    yield last
                return
            if found := reader.add(line):
                yield found

    def _obey(self, name: str, argument: str) -> None:
        match name:
            case "regenerate":
                if self._conversation.again():
                    self._answer()
                else:
                    self._terminal.note("Nothing was said yet.")
            case "system":
                if argument:
                    self._conversation.system = argument
                self._terminal.note(f"The model is told: {self._conversation.system or 'nothing'}")
            case "clear":
                self._conversation.clear()
                self._last = None
                self._terminal.note("The model has forgotten what was said.")
            case "stats":
                if self._last:
                    self._show_stats(self._last)
                else:
                    self._terminal.note("There is no complete answer yet.")
            case "help" | "?":
                self._terminal.note(HELP)
            case _:
                self._terminal.note(f"There is no /{name:.40}; /help shows what there is.")

    def _say(self, text: str) -> None:
        self._conversation.say(text)
        self._answer()

    def _answer(self) -> None:
        """Write the answer to what was said last; Ctrl-C stops it."""
        parts: list[str] = []
        try:
            with contextlib.closing(self._chunks()) as chunks:
                for chunk in chunks:
                    self._last = chunk.generation or self._last
                    if chunk.text and not chunk.generation:
                        parts.append(chunk.text)
                        self._terminal.write(chunk.text)
        except KeyboardInterrupt:
            self._terminal.note("\n(stopped)")
        except DistributedLLMError as exc:
            if not self._keeps_going:
                raise
            self._terminal.note(f"Error ({exc.code}): {exc}")
        self._terminal.write("\n")
        if parts:
            self._conversation.answered("".join(parts))
        else:
            self._conversation.take_back()

    def _chunks(self) -> Generator[Chunk, None, None]:
        if self._has_template:
            yield from self._client.stream_chat(self._conversation.messages(), **self._params)
        else:
            yield from self._client.stream(self._conversation.as_text(), **self._params)
