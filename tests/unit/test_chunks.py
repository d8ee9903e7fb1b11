"""Pieces of an answer: however long, each message is one that a client can read."""

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from distributed_llm.common import codec
from distributed_llm.common.messages import (
    MAX_SPELLING,
    MAX_STAGES,
    MAX_TRACED,
    FinishReason,
    Spelling,
    StageHop,
    StepTrace,
    TokenChunk,
    TokenLogprobs,
)
from distributed_llm.common.types import Epoch, LayerRange
from distributed_llm.coordinator.serving.chunks import messages_of

LARGEST = TokenLogprobs(
    logprob=-1.1,
    top=((2**31 - 1, -1.1),) * 20,
    spelled=(Spelling(written=b"x" * MAX_SPELLING),) * 21,
)

LONGEST = StepTrace(
    index=2**53,
    sampled=True,
    epoch=Epoch(2**53),
    start=2**53,
    tokens=2**53,
    step_tokens=2**53,
    step_sequences=2**53,
    began_s=0.1,
    took_s=0.1,
    outside_s=0.1,
    hops=(
        StageHop(
            worker="w" * 64,
            layers=LayerRange(65534, 65535),
            bytes_in=2**53,
            link_s=0.1,
            queued_s=0.1,
            compute_s=0.1,
        ),
    ),
)


@given(
    char=st.sampled_from(["\n", "é", "\ud7ff", "👩"]),
    chars=st.one_of(st.integers(0, 3), st.integers(8190, 70_000)),
    tokens=st.one_of(st.integers(0, 9), st.integers(62, 5000)),
    with_logprobs=st.booleans(),
    steps=st.integers(0, MAX_TRACED),
    stages=st.sampled_from([1, 2, 3, 16, 17, MAX_STAGES]),
    end=st.sampled_from([None, "stop", "length"]),
)
@settings(max_examples=60, deadline=None)
def test_a_client_can_read_every_message_and_gets_all_of_it(
    char: str,
    chars: int,
    tokens: int,
    with_logprobs: bool,
    steps: int,
    stages: int,
    end: FinishReason | None,
) -> None:
    piece = TokenChunk(
        request_id="r" * 64,
        choice=63,
        index=7,
        text=char * chars,
        token_ids=(2**31 - 1,) * tokens,
        logprobs=(LARGEST,) * tokens if with_logprobs else (),
        finish_reason=end,
        trace=(structs.replace(LONGEST, hops=LONGEST.hops * stages),) * steps,
    )
    read = []
    for message in messages_of(piece):
        frames = codec.encode(message)
        assert len(frames[1]) < codec.MAX_HEADER_BYTES
        decoded, _ = codec.to_client.decode(frames)
        assert isinstance(decoded, TokenChunk)
        read.append(decoded)
    come = 7
    for message in read:
        assert (message.index, message.choice) == (come, 63)
        assert len(message.logprobs) == (len(message.token_ids) if with_logprobs else 0)
        come += len(message.token_ids)
    assert "".join(message.text for message in read) == piece.text
    assert [token for message in read for token in message.token_ids] == list(piece.token_ids)
    assert tuple(step for message in read for step in message.trace) == piece.trace
    assert [message.finish_reason for message in read] == [*[None] * (len(read) - 1), end]


def test_what_is_short_is_one_message() -> None:
    piece = TokenChunk(request_id="r", index=0, text="x" * 8192, token_ids=(1,) * 4)
    assert [*messages_of(piece)] == [piece]
