"""When an idle worker measures its machine."""

from distributed_llm.worker.session.events import Probe
from distributed_llm.worker.session.probing import Probing


def test_every_ten_seconds_from_the_beginning_of_the_session() -> None:
    probing = Probing(7, now=3.0)
    assert probing.next_deadline() == 13.0
    assert probing.on_timer(12.9) == []
    assert probing.on_timer(13.5) == [Probe(7)]
    assert probing.on_timer(13.5) == []
    assert probing.next_deadline() == 23.5


def test_at_once_when_layers_are_lost() -> None:
    probing = Probing(7, now=3.0)
    probing.lost_layers(5.0)
    assert probing.on_timer(5.0) == [Probe(7)]
    assert probing.next_deadline() == 15.0
