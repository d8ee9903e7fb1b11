"""Requests that are under way: who sees them, and who may cancel them. And the seed's own route."""

import httpx

from distributed_llm import DistributedClient
from tests.api.conftest import LIMIT_S, Api

LONG = {
    "model": "default",
    "prompt": "Once",
    "raw": True,
    "options": {"num_predict": 100_000, "temperature": 0},
}


def client_of(api: Api, key: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=api.url, headers=headers, timeout=LIMIT_S)


def test_a_text_is_processed_as_the_seed_says(api: Api) -> None:
    with DistributedClient(api.cluster.address) as direct:
        expected = direct.generate("Once upon", seed=1, temperature=0.0)
    assert expected
    metadata = {"timestamp": "2024-02-17T12:00:00Z", "type": "text_generation"}
    with client_of(api, api.key) as client:
        body = {"text": "Once upon", "metadata": metadata}
        answer = client.post("/api/model/process", json=body).json()
        wrong = client.post("/api/model/process", json={"metadata": metadata})
    assert answer.keys() == {"text", "processingTime", "nodeCount"}
    assert isinstance(answer["text"], str)
    assert answer["processingTime"] > 0
    assert answer["nodeCount"] == 2
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "text")
