"""ROUTER and DEALER sockets under asyncio. The only package that uses ZeroMQ.

Both sockets call back on the event loop's thread.
"""

from distributed_llm.common.transport.dealer import Dealer
from distributed_llm.common.transport.router import Delivery, Router

__all__ = ["Dealer", "Delivery", "Router"]
