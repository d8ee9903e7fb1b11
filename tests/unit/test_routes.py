"""Which hops a step passes directly: over links, unless it would overtake or may be lost there."""

import pytest

from distributed_llm.coordinator.serving.routes import Routes

RELAYED, DIRECT = (False, False), (True, True)


def routes(*links: int) -> Routes:
    """Three stages, with links after these."""
    made = Routes(2)
    for hop in links:
        assert not made.set_link(hop, True)
    return made


def test_steps_use_the_links_that_are_up() -> None:
    assert routes().choose([]) == RELAYED
    assert routes(1).choose([]) == (False, True)
    assert routes(0, 1).choose([DIRECT, DIRECT]) == DIRECT


def test_a_link_was_there_until_it_goes_down() -> None:
    two = routes(0)
    assert not two.set_link(1, False)
    assert two.set_link(0, False)
    assert not two.set_link(0, False)
    assert two.choose([]) == RELAYED


def test_no_step_overtakes_one_that_is_relayed() -> None:
    two = routes(0)
    old = two.choose([])
    assert not two.may_overtake([old])
    two.set_link(1, True)
    assert two.may_overtake([old])
    assert two.choose([old]) == (True, False)
    assert not two.may_overtake([])
    assert two.choose([]) == DIRECT


def test_a_step_that_uses_a_link_that_has_gone_down_is_not_waited_for() -> None:
    two = routes(0, 1)
    two.set_link(0, False)
    assert not two.may_overtake([DIRECT])
    assert two.choose([DIRECT]) == (False, True)


def test_after_a_step_may_be_lost_all_are_relayed_until_enough_have_ended() -> None:
    two = routes(0, 1)
    assert not two.suspected
    two.suspect()
    assert two.suspected
    assert two.relays_all
    assert two.choose([]) == RELAYED
    assert not two.may_overtake([RELAYED]), "new ones take no other way"
    two.step_ended()
    assert not two.suspected, "it is known again that steps arrive"
    assert two.relays_all


def test_links_that_may_swallow_steps_are_tried_again_after_more_and_more_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distributed_llm.coordinator.serving.routes._MAX_RELAY_STEPS", 256)
    two, relayed = routes(0, 1), []
    for _ in range(4):
        two.suspect()
        relayed.append(0)
        while two.choose([]) == RELAYED:
            two.step_ended()
            relayed[-1] += 1
    assert relayed == [64, 128, 256, 256]
