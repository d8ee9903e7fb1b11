"""ROUTER and DEALER sockets under asyncio, encrypted, between holders of keys who know each other.

The only package that uses ZeroMQ. Both sockets call back on the event loop's thread.
"""

from distributed_llm.common.transport.dealer import Dealer, Login, Rejection
from distributed_llm.common.transport.keys import key_pair_of, new_key_pair
from distributed_llm.common.transport.router import Delivery, Door, Router

__all__ = [
    "Dealer",
    "Delivery",
    "Door",
    "Login",
    "Rejection",
    "Router",
    "key_pair_of",
    "new_key_pair",
]
