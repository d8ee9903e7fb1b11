"""`/metrics`: the cluster and this API, for Prometheus."""

from collections.abc import Iterable

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from distributed_llm.api.asking import Asking
from distributed_llm.api.operations.cluster_metrics import families
from distributed_llm.common.errors import ConnectionFailed
from distributed_llm.common.messages import ClusterStatus

router = APIRouter()


class ClusterCollector(Collector):
    """Tells the metrics of a cluster by its status.

    Attributes:
        status: the newest; None if there is no coordinator.
    """

    status: ClusterStatus | None = None

    def collect(self) -> Iterable[Metric]:
        """Return the metrics."""
        return families(self.status)


@router.get("/metrics")
async def metrics(request: Request, caller: Asking) -> Response:
    """Return all metrics, in the text format that is asked for."""
    try:
        status = await caller.client.status()
    except ConnectionFailed:
        status = None  # what this API counts is told all the same
    registry: CollectorRegistry = request.app.state.metrics
    collector: ClusterCollector = request.app.state.cluster_metrics
    collector.status = status
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), media_type=content_type)
