"""ASGI middleware that counts and times requests, by the route that served them."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Scope

from distributed_llm.api.guard.ends import METHODS, Ends

NO_ROUTE = "none"
"""Handler of requests that no route served: no such path, or refused before."""

_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)


class HttpMeter(Ends):
    """Keeps `http_requests_total` and `http_request_duration_seconds`.

    Their labels have closed sets of values, whatever clients send: routes in place of paths.

    Args:
        registry: that the metrics are added to.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(app, clock)
        self._requests = Counter(
            "http_requests_total",
            "Requests over HTTP that are over.",
            ("handler", "method", "status"),
            registry=registry,
        )
        self._durations = Histogram(
            "http_request_duration_seconds",
            "From the request's head to the end of the response.",
            ("handler", "method"),
            buckets=_BUCKETS,
            registry=registry,
        )

    def ended(self, scope: Scope, status: int, took_s: float) -> None:
        """Count a request, and keep what it took."""
        handler = getattr(scope.get("route"), "path", NO_ROUTE)
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._requests.labels(handler, method, status).inc()
        self._durations.labels(handler, method).observe(took_s)
