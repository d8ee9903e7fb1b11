"""What `dllm up` says: sentences, made of facts. Pure."""

from collections.abc import Sequence
from datetime import datetime

from distributed_llm.common.messages import ClusterStatus
from distributed_llm.common.wording import count_text, list_text, room_text

_MAX_OTHERS = 3
"""Further addresses of this machine that are told to people."""

_LABEL = 24
"""Characters before the commands."""


def command_line(label: str, command: str) -> str:
    """Return a line with a command to type, after what it is for."""
    return f"  {label + ':':<{_LABEL}}{command}"


def headline(status: ClusterStatus) -> tuple[str, ...]:
    """Return what runs, or why it does not run yet."""
    match status.state:
        case "serving":
            return (f"{status.model} is served, with room for {_context(status)}.",)
        case "loading":
            return (f"{status.model} is being loaded; others can join meanwhile.",)
        case _:
            return (f"{status.model} is not served yet, as said above; others can join meanwhile.",)


def _context(status: ClusterStatus) -> str:
    return room_text(status.kv_tokens, status.most_texts)


def asking(port_flag: str, *, insecure: bool) -> tuple[str, ...]:
    """Return how to ask the coordinator from this machine.

    Args:
        port_flag: names its address, with a space before it; empty where that is the default.
        insecure: whether it uses no keys.
    """
    flags = port_flag + (" --insecure" if insecure else "")
    return (
        command_line("ask", f'dllm generate{flags} "Once upon a time"'),
        command_line("see who does what", f"dllm status{flags}"),
    )


def access(url: str, page_key: str, app_key: str) -> tuple[str, ...]:
    """Return how the API is used: by people, and by programs.

    Args:
        url: "http://HOST:PORT".
        page_key: of an admin, for the page; empty where no keys are used.
        app_key: of a client, for programs; empty as well.
    """
    authorization = f" -H 'Authorization: Bearer {app_key}'" if app_key else ""
    return (
        command_line("page", f"{url}/#key={page_key}" if page_key else f"{url}/"),
        command_line("base URL for apps", f"{url}/v1"),
        command_line("key for apps", app_key or "none is needed"),
        command_line(
            "try",
            f"curl {url}/v1/completions{authorization} -H 'Content-Type: application/json' "
            '-d \'{"model": "default", "prompt": "Once upon a time"}\'',
        ),
    )


def no_keys(url: str, why: str) -> tuple[str, ...]:
    """Return that the API listens, and why there are no keys for it."""
    return (command_line("page", f"{url}/"), f"  There are no keys for it: {why}")


def only_here(port: int) -> tuple[str, ...]:
    """Return that no other machine can join."""
    return (
        f"  Only this machine can reach it. For others, give it --bind 0.0.0.0:{port}.",
        "  Ctrl-C ends it.",
    )


def joining(
    command: str, others: Sequence[str], *, uses: int, expires: datetime, now: datetime, revoke: str
) -> tuple[str, ...]:
    """Return how other machines join by a token.

    Args:
        command: to type there.
        others: further "HOST:PORT"s of the coordinator.
        uses: machines for which the token is good.
        expires: until then.
        revoke: the command that ends it.
    """
    return (
        command_line("on another machine", command),
        f"{'':<{_LABEL + 2}}good for {count_text(uses, 'machine')} until "
        f"{_moment(expires, now)}; `{revoke}` ends it",
        *_elsewhere(others),
        "  Ctrl-C ends all of this.",
    )


def joining_without_keys(best: str, others: Sequence[str]) -> tuple[str, ...]:
    """Return how other machines join a coordinator that uses no keys."""
    return (
        command_line("on another machine", f"dllm worker --insecure --coordinator {best}"),
        f"{'':<{_LABEL + 2}}NO KEYS: whoever reaches its port may do everything",
        *_elsewhere(others),
        "  Ctrl-C ends all of this.",
    )


def _elsewhere(others: Sequence[str]) -> tuple[str, ...]:
    if not others:
        return ()
    return (
        f"{'':<{_LABEL + 2}}(in other networks with "
        f"{list_text(others[:_MAX_OTHERS]).replace(' and ', ' or ')} as its address)",
    )


def _moment(then: datetime, now: datetime) -> str:
    """Return a moment of the next days: "today 14:30", "tomorrow 14:30", "Sunday 14:30"."""
    days = (then.date() - now.date()).days
    day = {0: "today", 1: "tomorrow"}.get(days, f"{then:%A}")
    return f"{day} {then:%H:%M}"
