"""Enrols this machine at a coordinator, by the token in a join line."""

import asyncio
from typing import assert_never

from distributed_llm.common import codec
from distributed_llm.common.addresses import addresses_of
from distributed_llm.common.connection import Connection
from distributed_llm.common.errors import (
    CoordinatorLost,
    CoordinatorUnreachable,
    DistributedLLMError,
    NotAllowed,
    NotEnrolled,
    ProtocolMismatch,
    RemoteProtocolError,
    WrongServerKey,
    error_from_wire,
)
from distributed_llm.common.join_line import JoinLine
from distributed_llm.common.keyring import Keyring
from distributed_llm.common.keys import KeyPair, fingerprint
from distributed_llm.common.messages import Enrol, Enrolled, Refused
from distributed_llm.common.tensors import Frame
from distributed_llm.common.transport import Login, Rejection, key_pair_of, new_key_pair
from distributed_llm.common.wording import no_coordinator_text


async def enrol(keyring: Keyring, line: JoinLine, name: str, timeout_s: float) -> Enrolled:
    """Enrol this machine and keep its key; a machine that is enrolled already stays what it is.

    Args:
        name: that the machine would like to have.

    Raises:
        NotAllowed: the token is used up, expired or revoked.
        WrongServerKey: this machine knows another coordinator at that address.
        CoordinatorUnreachable: no coordinator answered within `timeout_s`.
        ConfigError: the key cannot be kept.
    """
    known = keyring.kept(line.address)
    if known and known.server != line.server:
        raise WrongServerKey(
            f"The coordinator at {line.address} was known by the key {fingerprint(known.server)}, "
            f"and this line names {fingerprint(line.server)}. If it was set up anew, delete "
            f"{keyring.path(line.address)} and join again; else ask who runs it: somebody may be "
            "in between."
        )
    keys = known.keys if known else new_key_pair()
    enrolled = await ask(line, keys, name, timeout_s)
    keyring.save(line.address, line.server, keys, name=enrolled.name)
    return enrolled


async def ask(line: JoinLine, keys: KeyPair, name: str, timeout_s: float) -> Enrolled:
    """Enrol the holder of a key; see `enrol`."""
    answer: asyncio.Future[Enrolled] = asyncio.get_running_loop().create_future()

    def fail(error: DistributedLLMError) -> None:
        if not answer.done():
            answer.set_exception(error)

    def heard(frames: list[Frame]) -> None:
        try:
            message, _ = codec.to_client.decode(frames)
        except (ProtocolMismatch, RemoteProtocolError) as exc:
            fail(exc)
            return
        if isinstance(message, Refused):
            fail(error_from_wire(message.code, message.message, 0.0))
        elif isinstance(message, Enrolled) and not answer.done():
            answer.set_result(message)

    login = Login(line.server, key_pair_of(line.secret))
    try:
        async with asyncio.timeout(timeout_s):
            connection = Connection(
                line.address,
                await addresses_of(line.address),
                heard,
                lambda: connection.send(codec.encode(Enrol(key=keys.public, name=name))),
                lambda: fail(CoordinatorLost(f"The coordinator at {line.address} is gone.")),
                login=login,
                on_rejected=lambda why: fail(_rejected(line, why)),
            )
            try:
                return await answer
            finally:
                connection.close()
    except TimeoutError:
        raise CoordinatorUnreachable(
            f"No coordinator at {line.address} after {timeout_s:g} s: {no_coordinator_text(False)}."
            " Check that it runs, that both machines are in the same network, and that no firewall "
            "there closes its port."
        ) from None


def _rejected(line: JoinLine, why: Rejection) -> NotAllowed:
    """Return what to tell somebody whose join line was rejected."""
    again = "Ask who runs it for a new line: `dllm token create`."
    if why is Rejection.OUR_KEY:
        return NotEnrolled(
            f"The coordinator at {line.address} does not know the token in this line: it was "
            f"revoked, expired long ago, or is not copied right. {again}"
        )
    if why is Rejection.SERVER_KEY:
        return WrongServerKey(
            f"What answers at {line.address} does not hold the key {fingerprint(line.server)} that "
            "is in this line: the line is of another coordinator, that one was set up anew or uses "
            "no keys any more (--insecure, as workers then need), or somebody is in between. "
            f"Nothing was sent to it. {again}"
        )
    if why is Rejection.NO_KEYS:
        return NotAllowed(
            f"What answers at {line.address} uses no keys, so nobody can join it by a line: it is "
            "no coordinator, or one that was started with --insecure. If that is meant: dllm "
            f"worker --insecure --coordinator {line.address}"
        )
    assert_never(why)
