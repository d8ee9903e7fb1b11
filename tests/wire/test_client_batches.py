"""Many prompts in one call, against a queue with little room."""

from collections.abc import Iterator

import pytest

from distributed_llm import DistributedClient, Overloaded
from distributed_llm.client.batch import MAX_ANSWERS, Pace
from distributed_llm.common.messages import Generate, RequestFailed, ToClient
from tests.fake_coordinator import FakeCoordinator, finished, piece

pytestmark = pytest.mark.timeout(60)


class Queue:
    """Holds requests back and refuses those beyond its room; answers all once `patience` wait."""

    def __init__(self, room: int, patience: int, retry_after_s: float = 0.0) -> None:
        self.room = room
        self.patience = patience
        self.retry_after_s = retry_after_s
        self.most = 0
        self.refused = 0
        self._held: list[Generate] = []

    def __call__(self, request: Generate) -> list[ToClient]:
        if len(self._held) >= self.room:
            self.refused += 1
            answers: list[ToClient] = [
                RequestFailed(
                    request_id=request.request_id,
                    code="overloaded",
                    message="Full.",
                    retry_after_s=self.retry_after_s,
                )
            ]
        else:
            self._held.append(request)
            self.most = max(self.most, len(self._held))
            answers = []
        if len(self._held) >= self.patience and (self.room > self.patience or self.refused):
            for held in reversed(self._held):
                answers += [
                    *(
                        piece(held, held.request_id, 1, choice=choice, end="stop")
                        for choice in range(held.params.n)
                    ),
                    finished(held),
                ]
            self._held.clear()
        return answers


@pytest.fixture
def coordinator() -> Iterator[FakeCoordinator]:
    with FakeCoordinator() as fake:
        yield fake


def prompts_by_id(coordinator: FakeCoordinator) -> dict[str, str]:
    return {
        request.request_id: frames[0].decode()
        for request, frames in zip(coordinator.requests, coordinator.prompts, strict=True)
    }


def test_a_long_list_keeps_a_bounded_number_under_way(coordinator: FakeCoordinator) -> None:
    queue = coordinator.script = Queue(room=10_000, patience=MAX_ANSWERS // 2)
    told: list[tuple[int, int]] = []
    prompts = [str(number) for number in range(MAX_ANSWERS * 2)]
    with DistributedClient(coordinator.address) as client:
        answers = client.generate(prompts, n=2, progress=lambda *at: told.append(at))
    asked = prompts_by_id(coordinator)
    assert [[asked[choice] for choice in both] for both in answers] == [[p, p] for p in prompts]
    assert queue.most == MAX_ANSWERS // 2, "prompts of two answers each"
    assert told == [(done, len(prompts)) for done in range(1, len(prompts) + 1)]


def test_what_a_full_queue_refuses_is_sent_again(coordinator: FakeCoordinator) -> None:
    queue = coordinator.script = Queue(room=40, patience=40)
    prompts = [str(number) for number in range(700)]
    with DistributedClient(coordinator.address) as client:
        # The last ones would wait for more to come.
        answers = client.generate(prompts + ["more"] * 20)[:700]
    asked = prompts_by_id(coordinator)
    assert queue.refused
    assert [asked[answer] for answer in answers] == prompts


def test_no_prompts_have_no_answers(coordinator: FakeCoordinator) -> None:
    with DistributedClient(coordinator.address) as client:
        assert client.generate([], n=2) == []
    assert coordinator.requests == []


def test_a_list_is_given_up_when_its_time_is_over(coordinator: FakeCoordinator) -> None:
    coordinator.script = Queue(room=0, patience=1, retry_after_s=30.0)
    with DistributedClient(coordinator.address) as client:
        with pytest.raises(Overloaded, match="Full"):
            client.generate(["a", "b"], timeout_s=10)
        with pytest.raises(Overloaded, match="Full"):
            client.generate("a single prompt is told at once")


def test_refusals_slow_down_once_and_answers_speed_up() -> None:
    pace = Pace(answers_each=1)
    assert (pace.limit, pace.pause_s(0, now=5.0)) == (MAX_ANSWERS, 0.0)
    assert pace.pause_s(MAX_ANSWERS, now=5.0) is None
    for _ in range(9):  # all refused at the same time
        pace.refused(2.0, now=5.0)
    assert (pace.limit, pace.pause_s(0, now=5.5)) == (MAX_ANSWERS // 2, 1.5)
    pace.refused(2.0, now=7.0)
    assert pace.limit == MAX_ANSWERS // 4
    for _ in range(MAX_ANSWERS):
        pace.answered()
    assert pace.limit == MAX_ANSWERS
    for second in range(20):
        pace.refused(0.0, now=100.0 + second)
    assert pace.limit == 1
    assert Pace(answers_each=2 * MAX_ANSWERS).limit == 1
