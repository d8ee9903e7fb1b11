"""Says who may connect to the sockets of a ZeroMQ context (ZeroMQ's protocol ZAP, RFC 27).

Libzmq asks on `inproc://zeromq.zap.01` whether a key may connect, and waits for the answer. Sockets
are made with `ZAP_ENFORCE_DOMAIN`, so that nobody may connect while nobody answers.
"""

import contextlib
import logging
from collections.abc import Callable

import zmq
from zmq.auth.base import Authenticator as ZapAuthenticator
from zmq.utils import z85

from distributed_llm.common.keys import KeyPair, PublicKey, key_bytes, key_text
from distributed_llm.common.transport.pump import Pump

DOMAIN = "dllm"
"""ZAP domain of the sockets that are asked about."""

USER_ID = "User-Id"
"""Property of a message that holds the public key of its sender."""

logger = logging.getLogger(__name__)


class Authenticator(ZapAuthenticator):
    """Answers libzmq on the running event loop; to be made before the context's first socket binds.

    There is no thread that could end unnoticed: a bug of its own ends the program like any other.

    Args:
        admits: returns whether the holder of a key may connect. One that raises admits nobody.
    """

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", admits: Callable[[PublicKey], bool]
    ) -> None:
        super().__init__(context, log=logger)
        self._admits = admits
        self.configure_curve_callback(DOMAIN, self)
        self.start()
        assert self.zap_socket is not None
        self._pump = Pump(self.zap_socket, self._asked)

    def callback(self, domain: str, key: bytes) -> bool:
        """Return whether the holder of `key`, in ZeroMQ's Z85, may connect."""
        try:
            return self._admits(PublicKey(key_text(z85.decode(key))))
        except Exception:
            logger.exception("nobody could say whether a peer may connect: it may not")
            return False

    def curve_user_id(self, client_public_key: bytes) -> str:
        """Return what messages of the holder of a key carry as `USER_ID`."""
        return key_text(client_public_key)

    def close(self) -> None:
        """Answer no more: nobody may connect from now on."""
        self._pump.close()
        self.stop()

    def _asked(self, parts: list[zmq.Frame]) -> None:
        answering = self.handle_zap_message([part.bytes for part in parts])
        with contextlib.suppress(StopIteration):  # it waits for nothing, as `callback` does not
            answering.send(None)


def be_curve_server(socket: "zmq.Socket[bytes]", keys: KeyPair) -> None:
    """Have a socket let only those in whom the authenticator of its context admits."""
    socket.zap_domain = DOMAIN.encode()
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    socket.curve_secretkey = key_bytes(keys.secret)
    socket.curve_publickey = key_bytes(keys.public)
    socket.curve_server = True
