"""The machines that may connect, and the tokens by which others enrol. Pure.

A token is a key pair. Its secret is the token that people pass on, and only its public half is kept
here: who holds the secret may connect as the holder of the token, which is good for one message, to
enrol another key. So nothing secret is sent or kept, and a stranger is refused by the handshake.
"""

from typing import Annotated

import msgspec

from distributed_llm.common.errors import InvalidRequest, NotAllowed
from distributed_llm.common.keys import PublicKey, token_id
from distributed_llm.common.roles import Role
from distributed_llm.common.wording import duration_text

MAX_MACHINES = 4096
MAX_TOKENS = 256

_REMEMBERED_S = 7 * 86_400.0
"""Time for which a token that is used up or expired is remembered, so that its holder is told."""


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A machine, or a user on it, that is enrolled.

    Attributes:
        name: no other machine has it, and no worker of another machine may take it.
        enrolled_at: seconds since 1970.
    """

    name: str
    key: PublicKey
    role: Role
    enrolled_at: float


class Token(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What lets machines enrol.

    Attributes:
        uses_left: machines that may still enrol by it; None for any number.
        expires_at: seconds since 1970; None for never.
    """

    key: PublicKey
    role: Role
    created_at: float
    uses_left: int | None
    expires_at: float | None

    @property
    def id(self) -> str:
        """Its name for people, which is no secret."""
        return token_id(self.key)


class MembersState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What outlives the process."""

    machines: Annotated[tuple[Machine, ...], msgspec.Meta(max_length=MAX_MACHINES)] = ()
    tokens: Annotated[tuple[Token, ...], msgspec.Meta(max_length=MAX_TOKENS)] = ()


class Members:
    """Who may connect to a coordinator.

    Time is in seconds since 1970, by the coordinator's clock alone.

    Args:
        state: as `state` returned it earlier.
    """

    def __init__(self, state: MembersState) -> None:
        self._machines = {machine.key: machine for machine in state.machines}
        self._tokens = {token.key: token for token in state.tokens}

    @property
    def state(self) -> MembersState:
        """What to keep, so that the same machines may connect to the next process."""
        return MembersState(tuple(self._machines.values()), tuple(self._tokens.values()))

    @property
    def machines(self) -> tuple[Machine, ...]:
        """The machines, in the order in which they enrolled."""
        return tuple(self._machines.values())

    def tokens(self, *, now: float) -> tuple[Token, ...]:
        """Return the tokens that still let machines enrol, oldest first."""
        return tuple(token for token in self._tokens.values() if not self._fault(token, now))

    def admits(self, key: PublicKey) -> bool:
        """Return whether the holder of a key may connect: to work, or to be told why not."""
        return key in self._machines or key in self._tokens

    def machine(self, key: PublicKey) -> Machine | None:
        """Return the machine that holds a key; None if that is a token's, or nobody's."""
        return self._machines.get(key)

    def owner_of(self, name: str) -> Machine | None:
        """Return the machine that has a name, if any has."""
        return next((one for one in self._machines.values() if one.name == name), None)

    # -------------------------------------------------------------- tokens

    def create_token(
        self, key: PublicKey, role: Role, *, uses: int | None, lifetime_s: float | None, now: float
    ) -> Token:
        """Return a new token, of which the secret half stays with who asked for it.

        Args:
            uses: machines that may enrol by it; None for any number.
            lifetime_s: time for which they may; None for ever.

        Raises:
            InvalidRequest: there are too many tokens, or one of that key.
        """
        self._forget_old(now)
        if self.admits(key):
            raise InvalidRequest("This key is in use already. Make the token with a new one.")
        if len(self._tokens) >= MAX_TOKENS:
            raise InvalidRequest(
                f"There are {MAX_TOKENS} tokens, and no more are kept. Revoke some: "
                "`dllm token list` shows them."
            )
        expires_at = None if lifetime_s is None else now + lifetime_s
        token = Token(key, role, created_at=now, uses_left=uses, expires_at=expires_at)
        self._tokens[key] = token
        return token

    def revoke_token(self, token_id: str, *, now: float) -> Token:
        """Let nobody enrol by a token any more; machines that did stay.

        Raises:
            InvalidRequest: no token has this id.
        """
        for token in self.tokens(now=now):
            if token.id == token_id:
                del self._tokens[token.key]
                return token
        raise InvalidRequest(f"No token is called {token_id!r}; `dllm token list` shows them.")

    # -------------------------------------------------------------- machines

    def enrol(self, token_key: PublicKey, key: PublicKey, name: str, *, now: float) -> Machine:
        """Return the machine that a token lets in, under `name` or one like it.

        The same key may enrol again, with no use of the token if it has that role already.

        Raises:
            NotAllowed: the token is used up, expired or revoked, or the key is a token's.
            InvalidRequest: there are too many machines.
        """
        token = self._tokens.get(token_key)
        if token is None:
            raise NotAllowed("This token was revoked. Ask for a new one: `dllm token create`.")
        known = self._machines.get(key)
        if known and known.role.includes(token.role):
            return known
        if fault := self._fault(token, now):
            raise NotAllowed(f"{fault} Ask for a new one: `dllm token create`.")
        if key in self._tokens:
            raise NotAllowed("A machine needs a key of its own, not that of a token.")
        if known is None and len(self._machines) >= MAX_MACHINES:
            raise InvalidRequest(
                f"There are {MAX_MACHINES} machines, and no more are kept. Remove some: "
                "`dllm machines list` shows them."
            )
        name = known.name if known else self._free_name(name)
        machine = self._machines[key] = Machine(name, key, token.role, enrolled_at=now)
        if token.uses_left is not None:
            left = token.uses_left - 1
            self._tokens[token_key] = msgspec.structs.replace(token, uses_left=left)
        return machine

    def remove_machine(self, name: str) -> Machine:
        """Let a machine connect no more.

        Raises:
            InvalidRequest: no machine has this name.
        """
        machine = self.named(name)
        del self._machines[machine.key]
        return machine

    def named(self, name: str) -> Machine:
        """Return the machine that has a name.

        Raises:
            InvalidRequest: none has.
        """
        machine = self.owner_of(name)
        if machine is None:
            raise InvalidRequest(f"No machine is called {name!r}; `dllm machines list` shows them.")
        return machine

    def _free_name(self, wanted: str) -> str:
        names = {machine.name for machine in self._machines.values()}
        numbered = (f"{wanted[:58]}-{number}" for number in range(2, len(names) + 3))
        return next(name for name in (wanted, *numbered) if name not in names)

    def _fault(self, token: Token, now: float) -> str:
        """Return why a token is good for nothing, as a sentence; empty if it is good."""
        if token.uses_left == 0:
            return "This token is used up."
        if token.expires_at is not None and token.expires_at <= now:
            return f"This token expired {duration_text(now - token.expires_at)} ago."
        return ""

    def _forget_old(self, now: float) -> None:
        for token in list(self._tokens.values()):
            since = token.created_at if token.expires_at is None else token.expires_at
            if self._fault(token, now) and since + _REMEMBERED_S <= now:
                del self._tokens[token.key]
