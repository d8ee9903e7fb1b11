"""Fetching: wrong bytes, who gave them, and answers that do not fit."""

from collections.abc import Sequence
from dataclasses import replace

from distributed_llm.weights.fetching.events import (
    Action,
    Ask,
    Check,
    ChunkArrived,
    CloseSource,
    Failed,
    Forget,
    Log,
    Source,
    SourceDown,
    SourceUp,
    TensorClaimed,
    TensorWrong,
    Written,
)
from distributed_llm.weights.fetching.fetching import Fetching
from tests.unit.fetch_network import KIB, MIB, Network, Peer, sha, tensors
from tests.unit.fetch_scenes import (
    MAIN_AND_PC,
    closed,
    failure,
    keeps,
    lines,
    main_peer,
    run,
    three_chunks_asked_of_two_sources,
)

A, B = sha(0), sha(1)


def liar(sha256: str, offset: int) -> bool:
    return offset >= MIB


def test_who_gave_wrong_bytes_among_others_is_found_and_named() -> None:
    peers = [main_peer(), Peer("pc", lies=liar), Peer("mac")]
    network = run(Network(tensors(*[8 * MIB] * 6), peers))
    network.finish()
    assert closed(network) == ["pc"]
    assert "pc is not asked for weights any more: it gave wrong bytes of layer.0" in lines(network)
    assert "layer.0 had wrong bytes, from mac, main and pc, and is fetched again" in lines(network)
    first_wrong = next(at for at, action in network.told if isinstance(action, Log))
    again = {ask.source for at, ask in network.asks if at >= first_wrong and ask.sha256 == A}
    assert again == {"main"}
    assert network.given["mac"] > 8 * MIB


def test_wrong_bytes_are_told_while_they_are_fetched_again() -> None:
    network = Network(tensors(8 * MIB), [main_peer(), Peer("pc", lies=liar)])
    texts: list[str] = []
    network.at(0.8, lambda: texts.append(network.fetching.waits_for(network.now)))
    run(network)
    assert texts == ["wrong bytes in layer.0: all of it again from main"]


def test_who_alone_gave_wrong_bytes_is_the_liar() -> None:
    peers = [Peer("pc", lies=liar), main_peer()]
    network = Network(tensors(*[8 * MIB] * 3), peers)
    network.up("main", 0.9)
    run(network, "pc")
    network.finish()
    assert closed(network) == ["pc"]
    assert lines(network) == [
        "pc is not asked for weights any more: it gave wrong bytes of layer.0"
    ]


def test_what_a_liar_gave_of_other_tensors_is_dropped() -> None:
    peers = [Peer("pc", lies=liar), main_peer()]
    network = Network(tensors(2 * MIB, 30 * MIB), peers, disk_bytes_per_s=5 * MIB)
    network.up("main", 0.25)
    run(network, "pc")
    network.finish()
    assert [action for _, action in network.told if isinstance(action, Forget)] == [Forget(B)]


def test_the_trusted_source_has_a_second_chance_and_not_a_third() -> None:
    wrong_once = iter([True])
    network = Network(tensors(MIB), [main_peer(lies=lambda *_: next(wrong_once, False))])
    run(network).finish()
    assert lines(network) == [
        "layer.0 had wrong bytes, from main, and is fetched again",
        "main gave wrong bytes of layer.0, and then right ones: its memory or disk may be broken",
    ]
    network = run(Network(tensors(MIB), [main_peer(lies=lambda *_: True), Peer("pc")]))
    assert "layer.0 came from main with wrong bytes twice: memory or disk" in failure(network)


def test_a_wrong_partial_file_is_nobodys_fault() -> None:
    network = Network(tensors(2 * MIB), [Peer("pc"), main_peer()])
    network.files[A].done = MIB
    network.files[A].grains[0] = "", False
    run(network).finish()
    assert closed(network) == []
    assert sum(network.given.values()) >= 3 * MIB


def test_an_empty_tensor_can_be_wrong_too() -> None:
    fetch = Fetching(tensors(0), [], now=0.0)
    fetch.begin(0.0)
    fetch.handle(TensorClaimed(A, 0), 0.0)
    (end,) = fetch.handle(TensorWrong(A), 0.0)
    assert isinstance(end, Failed)
    assert "layer.0 is empty" in end.message


def test_a_liar_that_is_not_compared_ends_the_fetch_after_all() -> None:
    """The edge never says who it was, and nobody gives all of the tensor."""
    fetch = Fetching(tensors(128 * KIB), [Source(n, lambda _: True) for n in ("a", "b")], now=0.0)
    fetch.begin(0.0)
    fetch.handle(TensorClaimed(A, 64 * KIB), 0.0)
    end: list[Action] = []
    for _ in range(9):
        for name in ("a", "b"):
            asks = [x for x in fetch.handle(SourceUp(name), 0.0) if isinstance(x, Ask)]
            end = fetch.handle(ChunkArrived(name, A, asks[0].offset, asks[0].length), 0.0)
            assert keeps(end) == 1
            end = fetch.handle(Written(A, asks[0].offset + asks[0].length), 0.0)
            fetch.handle(SourceDown(name, ""), 0.0)
            if end == [Check(A)]:
                break
        end = fetch.handle(TensorWrong(A), 0.0)
        if end and isinstance(end[0], Failed):
            assert end[0].message.startswith(
                "layer.0 had wrong bytes 5 times, at last from a and b"
            )
            return
    raise AssertionError("the fetch has no end")


def test_a_chunk_of_another_length_than_asked_for() -> None:
    fetch = three_chunks_asked_of_two_sources()
    closing = fetch.handle(ChunkArrived("pc", A, 0, 12), 0.0)
    why = "sent 12 bytes where it was asked for 64.0 KiB"
    assert closing[:2] == [
        CloseSource("pc", why),
        Log(f"pc is not asked for weights any more: it {why}", "warning"),
    ]
    assert fetch.handle(SourceUp("pc"), 0.1) == []
    fetch.validate()


def fetched_again(sources: Sequence[Source]) -> tuple[Fetching, list[Action]]:
    """Main won the race for all chunks and they are wrong; pc still owes the first two."""
    fetch = three_chunks_asked_of_two_sources(sources)
    for offset in (128, 0, 64):
        fetch.handle(ChunkArrived("main", A, offset * KIB, 64 * KIB), 0.02)
    assert fetch.handle(Written(A, 192 * KIB), 0.02) == [Check(A)]
    return fetch, fetch.handle(TensorWrong(A), 0.02)


def test_a_late_answer_is_not_taken_for_that_to_a_new_question() -> None:
    fetch, actions = fetched_again(MAIN_AND_PC)
    assert actions[-1] == Ask("main", A, 0, 192 * KIB)
    assert fetch.handle(ChunkArrived("pc", A, 0, 64 * KIB), 0.03) == []


def test_who_owes_a_late_answer_is_not_asked_for_what_another_lost() -> None:
    fetch, _ = fetched_again(MAIN_AND_PC)
    fetch.handle(SourceDown("main", ""), 0.02)
    assert fetch.handle(ChunkArrived("pc", A, 64 * KIB, 64 * KIB), 0.03) == []
    asks = fetch.handle(ChunkArrived("pc", A, 0, 64 * KIB), 0.04)
    assert [ask for ask in asks if isinstance(ask, Ask) and ask.offset == 0]
    fetch.validate()


def test_who_owes_a_late_answer_is_not_asked_anew_for_its_place() -> None:
    main, pc = MAIN_AND_PC
    fetch, actions = fetched_again((replace(main, trusted=False), replace(pc, trusted=True)))
    assert CloseSource("main", "gave wrong bytes of layer.0") in actions
    assert fetch.handle(ChunkArrived("pc", A, 64 * KIB, 64 * KIB), 0.03) == []
    asks = fetch.handle(ChunkArrived("pc", A, 0, 64 * KIB), 0.04)
    assert asks == [Ask("pc", A, 0, 192 * KIB)]
    fetch.validate()


def test_bytes_that_nobody_asked_for_are_ignored() -> None:
    fetch = three_chunks_asked_of_two_sources()
    assert fetch.handle(ChunkArrived("pc", A, 128 * KIB, 64 * KIB), 0.0) == []
    assert fetch.handle(ChunkArrived("pc", "f" * 64, 0, 64 * KIB), 0.0) == []
