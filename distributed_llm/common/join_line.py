"""Join lines: where a coordinator is, and the token by which a machine enrols there. Pure."""

from dataclasses import dataclass

from distributed_llm.common.errors import ConfigError
from distributed_llm.common.keys import PublicKey, key_bytes
from distributed_llm.common.units import split_address

_SCHEME = "dllm://"


@dataclass(frozen=True)
class JoinLine:
    """What `dllm token create` prints: `dllm://HOST:PORT/KEY.SECRET`.

    Attributes:
        address: "HOST:PORT" of the coordinator.
        server: the key that the coordinator holds.
        secret: of the token.
    """

    address: str
    server: PublicKey
    secret: str

    def __str__(self) -> str:
        return f"{_SCHEME}{self.address}/{self.server}.{self.secret}"

    def __repr__(self) -> str:
        return f"JoinLine({self.address!r})"


def parse_join_line(text: str) -> JoinLine:
    """Return what a join line says.

    Raises:
        ConfigError: it is none; the message does not repeat it, as it may hold a secret.
    """
    address, slash, token = text.strip().removeprefix(_SCHEME).rpartition("/")
    server, dot, secret = token.partition(".")
    try:
        if not (text.strip().startswith(_SCHEME) and slash and dot):
            raise ValueError("a part is missing")
        split_address(address)
        key_bytes(server)
        key_bytes(secret)
    except ValueError as exc:
        raise ConfigError(
            f"This is no line to join with ({exc}). It looks like {_SCHEME}192.168.1.20:5555/..., "
            "and `dllm token create` prints it where the coordinator runs; copy all of it."
        ) from None
    return JoinLine(address, PublicKey(server), secret)
