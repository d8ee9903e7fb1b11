"""Finds the coordinator that this machine has joined, though its address may have changed."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from distributed_llm.common import discovery
from distributed_llm.common.addresses import addresses_of, listens
from distributed_llm.common.connection import Connection, rejection_error
from distributed_llm.common.discovery import Announced
from distributed_llm.common.errors import (
    CoordinatorUnreachable,
    DistributedLLMError,
    NotEnrolled,
    WrongServerKey,
)
from distributed_llm.common.keyring import Joined, Keyring
from distributed_llm.common.keys import fingerprint
from distributed_llm.common.transport import Login
from distributed_llm.common.wording import no_coordinator_text

SEARCH_S = 2.0
"""Time for which the local network is searched, seconds."""

_GREET_S = 3.0
"""Time for which a handshake is waited for, seconds."""

_AGAIN_S = 5.0
"""Time between two searches of one who waits, seconds."""

_GET_A_LINE = (
    "To join one, take the line that `dllm up` or `dllm token create` prints where it runs."
)

Search = Callable[[Callable[[Announced], bool], float], list[Announced]]


async def find_coordinator(
    keyring: Keyring,
    say: Callable[[str], None],
    *,
    wait: bool,
    search: Search = discovery.search,
) -> str:
    """Return the address of the coordinator that this machine joined, as it is now.

    That is where it was found last, unless it does not answer there. Then the local network is
    searched for coordinators whose keys this machine has. Whatever is announced is believed only
    once the handshake has shown that who listens there holds the key; then the address is kept.

    Args:
        say: called with each line about what happens.
        wait: look again and again until it is found.
        search: as `discovery.search`.

    Raises:
        NotEnrolled: this machine has joined none, or is not known there any more.
        CoordinatorUnreachable: it was not found.
        ConfigError: a key file is damaged, or others can read it.
    """
    joined = keyring.joined()
    if not joined:
        raise NotEnrolled(await _never_joined(search))
    while True:
        try:
            return await _look(keyring, joined, say, search)
        except (CoordinatorUnreachable, WrongServerKey) as exc:
            if not wait:
                raise
            say(f"{exc} Looking again.")
        say = _silence
        await asyncio.sleep(_AGAIN_S)


def _silence(text: str) -> None:
    """Say nothing: what happens again and again was said once."""


async def _look(
    keyring: Keyring, joined: Sequence[Joined], say: Callable[[str], None], search: Search
) -> str:
    latest = joined[0]
    why = await _greet(latest.address, latest.login)
    if why is None:
        return latest.address
    known = {fingerprint(one.login.server): one for one in reversed(joined)}
    say(f"Not found at {latest.address}; searching the local network for {SEARCH_S:g} s.")
    found = await asyncio.to_thread(search, lambda one: one.key in known, SEARCH_S)
    address = await _first_that_is(found, known, keyring, say)
    if address is None and any(one.key in known for one in found):
        # Whoever pretended to be it, or was it once, ended the search before it was over.
        tried, found = found, await asyncio.to_thread(search, lambda one: False, SEARCH_S)
        more = [one for one in found if one not in tried]
        address = await _first_that_is(more, known, keyring, say)
    if address is None:
        raise type(why)(f"{why} {_not_found(found)}")
    return address


async def _first_that_is(
    found: Sequence[Announced],
    known: Mapping[str, Joined],
    keyring: Keyring,
    say: Callable[[str], None],
) -> str | None:
    """Return the first address of a coordinator that holds its key, and keep it; None without one.

    All are dialled at once, so that many who pretend take no longer than one.

    Args:
        known: coordinators that this machine has joined, by the fingerprints of their keys.
    """
    candidates = [
        (announced, known[announced.key], address)
        for announced in found
        if announced.key in known
        for address in announced.addresses
    ]
    refusals = await asyncio.gather(*(_greet(address, one.login) for _, one, address in candidates))
    for (announced, one, address), refused in zip(candidates, refusals, strict=True):
        if refused is None:
            keyring.move(one.address, address)
            say(f"The coordinator of {announced.machine} is at {address} now.")
            return address
        if isinstance(refused, WrongServerKey):
            say(
                f"{announced.machine} at {address} announces itself as coordinator "
                f"{announced.key}, but does not hold its key, so it is not used: somebody "
                "pretends to be it."
            )
    return None


async def _greet(address: str, login: Login) -> CoordinatorUnreachable | WrongServerKey | None:
    """Return why the coordinator at "HOST:PORT" cannot be used; None if it holds its key.

    Raises:
        NotEnrolled: it does not know the key of this machine.
    """
    answer: asyncio.Future[DistributedLLMError | None]
    answer = asyncio.get_running_loop().create_future()

    def answered(error: DistributedLLMError | None) -> None:
        if not answer.done():
            answer.set_result(error)

    unreachable = _unreachable(address, reached=False)
    if not await listens(address):
        return unreachable
    connection = Connection(
        address,
        await addresses_of(address),
        lambda frames: None,
        lambda: answered(None),
        lambda: answered(unreachable),
        login=login,
        on_rejected=lambda why: answered(rejection_error(address, login, why)),
    )
    try:
        async with asyncio.timeout(_GREET_S):
            error = await answer
    except TimeoutError:
        return _unreachable(address, reached=True)
    finally:
        connection.close()
    if error is None or isinstance(error, CoordinatorUnreachable | WrongServerKey):
        return error
    raise error


def _unreachable(address: str, *, reached: bool) -> CoordinatorUnreachable:
    return CoordinatorUnreachable(f"No coordinator at {address}: {no_coordinator_text(reached)}.")


async def _never_joined(search: Search) -> str:
    said = "This machine has joined no coordinator yet."
    found = await asyncio.to_thread(search, lambda one: False, SEARCH_S)
    if not found:
        return (
            f"{said} Run `dllm up` or `dllm token create` where the coordinator runs, and here the "
            "line that it prints."
        )
    return f"{said} On the local network there are: {_list(found)}. {_GET_A_LINE}"


def _not_found(found: Sequence[Announced]) -> str:
    if not discovery.can_search():
        return (
            "Start it there, or join again where it is now. If only its address has changed, it is "
            f"found by itself after: {discovery.HOW_TO_INSTALL} (there as well)"
        )
    if not found:
        return (
            "Nor does it announce itself on the local network. Start it, or join again by a line "
            "of where it is now."
        )
    return f"On the local network there are: {_list(found)}. {_GET_A_LINE}"


def _list(found: Sequence[Announced]) -> str:
    return "; ".join(f"{one.machine} at {one.addresses[0]} (key {one.key})" for one in found)
