"""The codec: what goes in comes out, and nothing but a typed refusal comes of anything else."""

import math
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_llm.common import codec
from distributed_llm.common.codec import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    PREAMBLE,
    Decoder,
    encode,
    encode_payload,
)
from distributed_llm.common.errors import (
    LocalProtocolError,
    ProtocolMismatch,
    RemoteProtocolError,
)
from distributed_llm.common.messages import (
    MAX_CHAT_MESSAGES,
    MAX_SLICES,
    MAX_TENSORS,
    PROTOCOL_VERSION,
    Chat,
    ChatMessage,
    ClusterStatus,
    DecodeTokens,
    Embed,
    Embedded,
    EncodePrompt,
    Generate,
    Goodbye,
    Heartbeat,
    KVEnd,
    KVPieces,
    MembersReport,
    Message,
    ModelDescribed,
    ModelInfo,
    PeerProbe,
    PromptEncoded,
    RequestFailed,
    SequenceSlice,
    SharedPrefix,
    Spelling,
    StageFailed,
    StageTime,
    StatusReport,
    Task,
    TaskResult,
    TokenChunk,
    TokenLogprobs,
    TokensDecoded,
    Welcome,
    WorkerHello,
)
from distributed_llm.common.sampling_params import MAX_LOGIT_BIASES
from distributed_llm.common.tensors import MAX_FRAME_BYTES, Frame, TensorSpec
from distributed_llm.common.types import Epoch, Outline, SequenceId, StepNumber
from tests.wire.strategies import (
    CASE_IDS,
    CASES,
    DECODERS,
    example,
    example_frames,
    messages,
    plain,
    values,
)

every_message = pytest.mark.parametrize(("decoder", "kind"), CASES, ids=CASE_IDS)

HEARTBEAT: Mapping[str, Any] = {
    "type": "heartbeat",
    "epochs": [7],
    "progress_age_s": 0.5,
    "tasks_waiting": 1,
    "memory_used_bytes": 2,
    "kv_bytes": 3,
}


def read(header: Any, *tensors: Frame, decoder: Decoder[Message] = codec.to_coordinator) -> Any:
    """Decode a header, which may be plain values; return the message."""
    raw = header if isinstance(header, bytes) else msgpack.packb(header)
    return decoder.decode([PREAMBLE, raw, *tensors])[0]


def refuse(
    reason: str, header: Any, *tensors: Frame, decoder: Decoder[Message] = codec.to_coordinator
) -> str:
    """Check that a message is refused for `reason`; return what is said about it."""
    with pytest.raises(RemoteProtocolError) as caught:
        read(header, *tensors, decoder=decoder)
    assert caught.value.reason == reason
    assert len(str(caught.value)) < 1024
    return str(caught.value)


# ------------------------------------------------------------------ what is right


@every_message
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_message_comes_back(
    decoder: Decoder[Message], kind: type[Message], data: st.DataObject
) -> None:
    message, tensors = data.draw(messages(kind))
    assert decoder.decode(encode(message, tensors)) == (message, tensors)


@every_message
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_the_msgpack_package_reads_and_writes_the_same(
    decoder: Decoder[Message], kind: type[Message], data: st.DataObject
) -> None:
    message, tensors = data.draw(messages(kind))
    header = encode(message, tensors)[1]
    values_read = msgpack.unpackb(header, strict_map_key=False)
    assert values_read == plain(message)
    assert values_read["type"] == kind.__struct_config__.tag
    again = msgpack.packb(values_read)
    assert decoder.decode([PREAMBLE, again, *tensors]) == (message, tensors)


@every_message
def test_frames_of_the_socket_are_read_without_copying(
    decoder: Decoder[Message], kind: type[Message]
) -> None:
    message = example(kind)
    views = [memoryview(frame) for frame in encode(message, example_frames(message))]
    decoded, tensors = decoder.decode(views)
    assert decoded == message
    assert all(got is sent for got, sent in zip(tensors, views[2:], strict=True))


def test_the_examples_cover_every_message_and_direction() -> None:
    assert {decoder for decoder, _ in CASES} == set(DECODERS)
    tags = [kind.__struct_config__.tag for _, kind in CASES]
    assert len(set(tags)) == len({kind for _, kind in CASES})  # one tag, one message
    tensors = {kind for _, kind in CASES if hasattr(example(kind), "tensors")}
    of_clients = {DecodeTokens, Embed, EncodePrompt, Generate}
    to_clients = {
        Embedded,
        MembersReport,
        ModelDescribed,
        PromptEncoded,
        StatusReport,
        TokensDecoded,
    }
    of_workers = {KVEnd, KVPieces, PeerProbe, Task, TaskResult}
    assert tensors == of_clients | to_clients | of_workers


def chat_of(*messages: ChatMessage) -> Chat:
    return Chat(messages=messages)


@settings(max_examples=25, deadline=None)
@given(chat=values(msgspec.inspect.type_info(Chat)))
def test_conversations_come_back(chat: Chat) -> None:
    payload = encode_payload(chat)
    assert codec.decode_chat(payload) == chat
    assert msgpack.unpackb(payload) == plain(chat)


@settings(max_examples=25, deadline=None)
@given(status=values(msgspec.inspect.type_info(ClusterStatus)))
def test_status_comes_back(status: ClusterStatus) -> None:
    payload = encode_payload(status)
    assert codec.decode_status(payload) == status
    assert msgpack.unpackb(payload) == plain(status)


@settings(max_examples=25, deadline=None)
@given(info=values(msgspec.inspect.type_info(ModelInfo)))
def test_what_is_said_of_a_model_comes_back(info: ModelInfo) -> None:
    payload = encode_payload(info)
    assert codec.decode_model_info(payload) == info
    assert msgpack.unpackb(payload) == plain(info)


# ------------------------------------------------------------------ damage

OF_EACH_KIND = (
    *(0x00, 0x01, 0x7F, 0xE0, 0xFF),  # small numbers
    *(0x80, 0x81, 0x8F, 0x90, 0x91, 0x9F, 0xA0, 0xA1, 0xBF),  # short maps, arrays and texts
    *range(0xC0, 0xE0),  # all other kinds, and the one that there is not
)
"""Bytes of every kind that a value in msgpack begins with, and that no UTF-8 has alone.

All 256 in every place took five times as long, and nothing but numbers of the same kind was new.
"""


def tried(right: int) -> set[int]:
    """Return what a byte is damaged to: every kind of byte, and itself with any one bit flipped."""
    return {right, *OF_EACH_KIND, *(right ^ 1 << bit for bit in range(8))}


@every_message
def test_every_damaged_byte_is_refused_or_gives_a_message(
    decoder: Decoder[Message], kind: type[Message]
) -> None:
    message = example(kind)
    frames = encode(message, example_frames(message))
    refused = 0
    for index in (0, 1):
        frame = bytearray(frames[index])
        damaged = [*frames[:index], frame, *frames[index + 1 :]]
        for position, right in enumerate(bytes(frame)):
            for byte in tried(right):
                frame[position] = byte
                try:
                    got, tensors = decoder.decode(damaged)
                except (RemoteProtocolError, ProtocolMismatch):
                    refused += 1
                else:
                    assert byte == right or index == 1
                    assert [len(tensor) for tensor in tensors] == [
                        spec.nbytes for spec in getattr(got, "tensors", ())
                    ]
            frame[position] = right
    assert refused >= sum(len(tried(right) - {right}) for right in PREAMBLE)
    assert decoder.decode(frames)[0] == message  # undamaged again


@pytest.mark.parametrize(
    ("value", "decode"),
    [(example(Chat), codec.decode_chat), (example(ClusterStatus), codec.decode_status)],
    ids=["chat", "status"],
)
def test_every_damaged_byte_of_a_payload_is_refused_or_gives_a_value(
    value: Any, decode: Any
) -> None:
    payload = bytearray(encode_payload(value))
    for position, right in enumerate(bytes(payload)):
        for byte in tried(right):
            payload[position] = byte
            try:
                got = decode(payload)
            except RemoteProtocolError:
                continue
            assert type(got) is type(value)
            assert byte != right or got == value
        payload[position] = right
    assert decode(payload) == value


@every_message
def test_every_cut_is_refused(decoder: Decoder[Message], kind: type[Message]) -> None:
    message = example(kind)
    frames = encode(message, example_frames(message))
    for index, frame in enumerate(frames):
        for length in range(len(frame)):
            with pytest.raises(RemoteProtocolError):
                decoder.decode([*frames[:index], frame[:length], *frames[index + 1 :]])
        with pytest.raises(RemoteProtocolError):
            decoder.decode([*frames[:index], bytes(frame) + b"\0", *frames[index + 1 :]])
    for count in range(len(frames)):
        with pytest.raises(RemoteProtocolError):
            decoder.decode(frames[:count])
    with pytest.raises(RemoteProtocolError):
        decoder.decode([*frames, b""])
    assert decoder.decode(frames)[0] == message


@settings(max_examples=200, deadline=None)
@given(frames=st.lists(st.binary(max_size=80), max_size=5))
def test_noise_is_refused(frames: list[bytes]) -> None:
    for decoder in DECODERS:
        for given_frames in (frames, [PREAMBLE, *frames]):
            with pytest.raises(RemoteProtocolError):
                decoder.decode(given_frames)


# ------------------------------------------------------------------ frames (M9)


@pytest.mark.parametrize("count", [0, 1, 3 + MAX_TENSORS, 1000])
def test_a_wrong_number_of_frames_is_refused(count: int) -> None:
    frames = [*encode(Goodbye()), *[b""] * 1000][:count]
    with pytest.raises(RemoteProtocolError) as caught:
        codec.to_coordinator.decode(frames)
    assert caught.value.reason == "bad_frames"


def test_frames_without_a_spec_and_specs_without_a_frame_are_refused() -> None:
    result = example(TaskResult)
    header = bytes(encode(result, example_frames(result))[1])
    assert read(header, bytes(24)) == result
    refuse("bad_frames", header)
    refuse("bad_frames", header, bytes(24), bytes(24))
    assert read(bytes(encode(Goodbye())[1])) == Goodbye()
    refuse("bad_frames", bytes(encode(Goodbye())[1]), b"")


@pytest.mark.parametrize(
    "preamble",
    [b"", b"D", b"DLLM", b"dllm\1", b"DLLM\1\1", b"\1DLLM", b"GET / HTTP/1.1", bytes(5)],
    ids=repr,
)
def test_a_wrong_magic_is_refused(preamble: bytes) -> None:
    header = encode(Goodbye())[1]
    with pytest.raises(RemoteProtocolError) as caught:
        codec.to_coordinator.decode([preamble, header])
    assert caught.value.reason == "bad_magic"
    assert codec.to_coordinator.decode([PREAMBLE, header])[0] == Goodbye()


def test_empty_frames_are_refused() -> None:
    for frames in ([b"", b""], [PREAMBLE, b""], [b"", bytes(encode(Goodbye())[1])]):
        with pytest.raises(RemoteProtocolError):
            codec.to_coordinator.decode(frames)


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1, 255])
@every_message
def test_another_version_is_named_whatever_its_header_is(
    decoder: Decoder[Message], kind: type[Message], version: int
) -> None:
    message = example(kind)
    frames = encode(message, example_frames(message))
    for header in (frames[1], b"", b"\xc1 of a later version"):
        with pytest.raises(ProtocolMismatch) as caught:
            decoder.decode([codec.MAGIC + bytes([version]), header, *frames[2:]])
        assert f"version {version}," in str(caught.value)
        assert f"version {PROTOCOL_VERSION}." in str(caught.value)
    assert decoder.decode(frames)[0] == message


# ------------------------------------------------------------------ headers (M10, M11, M12)


def failure(length: int) -> bytes:
    """Header of exactly `length` bytes (about 64 KiB); what it says is too long for its field."""
    code = "c" * 200
    short = msgspec.msgpack.encode(StageFailed(epoch=Epoch(1), code=code, message="x" * 60_000))
    message = "x" * (60_000 + length - len(short))
    header = msgspec.msgpack.encode(StageFailed(epoch=Epoch(1), code=code, message=message))
    assert len(header) == length
    return header


def test_a_header_is_measured_before_it_is_decoded() -> None:
    assert "$.message" in refuse("bad_field", failure(MAX_HEADER_BYTES))  # decoded, and too long
    refuse("header_too_big", failure(MAX_HEADER_BYTES + 1))
    refuse("header_too_big", bytes(16 * 1024 * 1024))


NESTED = MAX_HEADER_BYTES - 1
BOMBS: Mapping[str, bytes] = {
    "array of 2**32": b"\xdd\xff\xff\xff\xff",
    "map of 2**32": b"\xdf\xff\xff\xff\xff",
    "string of 2**32": b"\xdb\xff\xff\xff\xff",
    "bytes of 2**32": b"\xc6\xff\xff\xff\xff",
    "nested arrays": b"\x91" * NESTED + b"\x90",
    "nested maps": b"\x81\xa0" * (NESTED // 2) + b"\x80",
    "nested arrays, unfinished": b"\x91" * MAX_HEADER_BYTES,
    "empty arrays": b"\xdc\xff\xf0" + b"\x90" * 65_520,
    "nested ext": b"\xc7\xff\x05" * 400,
    "ext of 2**32": b"\xc9\xff\xff\xff\xff\x05",
    "timestamp": b"\xd7\xff" + b"\xff" * 8,
    "never used": b"\xc1",
    "lone surrogate": b"\x81\xa4type\xa3\xed\xa0\x80",
    "not UTF-8": b"\x81\xa4type\xa2\xff\xfe",
}
# the same where a field is expected: behind what is right so far
BOMBS = {
    **BOMBS,
    **{f"{name}, in a known field": b"\x82\xa4type\xa9heartbeat\xa5epoch" + bomb[:60_000]
       for name, bomb in BOMBS.items()},
    **{f"{name}, in an unknown field": b"\x82\xa4type\xa7goodbye\xa5other" + bomb[:60_000]
       for name, bomb in BOMBS.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(name: str) -> None:
    for decoder in DECODERS:
        with pytest.raises(RemoteProtocolError) as caught:
            read(BOMBS[name], decoder=decoder)
        assert caught.value.reason in ("malformed", "bad_field")
    for decode in (codec.decode_chat, codec.decode_status):
        with pytest.raises(RemoteProtocolError):
            decode(BOMBS[name])


def test_four_million_empty_lists_are_refused() -> None:
    bomb = b"\xdd" + (4_000_000).to_bytes(4, "big") + b"\x90" * 4_000_000
    refuse("header_too_big", bomb)
    for decode in (codec.decode_chat, codec.decode_status):
        with pytest.raises(RemoteProtocolError):
            decode(bomb)


GROWTH = """
import re
from distributed_llm.common import codec
from distributed_llm.common.errors import RemoteProtocolError
from tests.wire.test_codec import BOMBS

def peak_kib():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1])

empty = b"\\x90" * 4_000_000
from distributed_llm.common.messages import Chat, ChatMessage
chat = codec.encode_payload(Chat(messages=(ChatMessage(role="user", content="four"),)))
start = chat.index(b"messages") + len(b"messages")
turn = chat[start + 1:chat.index(b"\\xa5tools")]
many = (codec.MAX_PAYLOAD_BYTES - 5) // len(turn)
payloads = [
    *BOMBS.values(),
    b"\\xdd" + (4_000_000).to_bytes(4, "big") + empty,
    chat[:start] + b"\\xdd" + many.to_bytes(4, "big") + turn * many,
    b"\\x91" * 4_000_000,
]
headers = [*BOMBS.values(), bytes(16 * 1024 * 1024), empty]
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")  # the peak starts again from what is held now
before = peak_kib()
refused = 0
for decode, given in (
    (lambda raw: codec.to_coordinator.decode([codec.PREAMBLE, raw]), headers),
    (lambda raw: codec.to_worker.decode([codec.PREAMBLE, raw]), headers),
    (codec.decode_chat, payloads),
    (codec.decode_status, payloads),
):
    for raw in given:
        try:
            decode(raw)
        except RemoteProtocolError:
            refused += 1
print(refused == 2 * len(headers) + 2 * len(payloads), peak_kib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_bombs_take_no_memory() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], cwd=root, capture_output=True, text=True, check=True
    )
    all_refused, growth_kib = done.stdout.split()
    assert all_refused == "True"
    assert int(growth_kib) < 32 * 1024


class Canary:
    """Leaves a mark where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_not_opened(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "mark"
    evil = pickle.dumps(Canary(mark), protocol)
    pickle.loads(evil)
    assert mark.is_dir()  # the canary sings
    mark.rmdir()
    for decoder in DECODERS:
        with pytest.raises(RemoteProtocolError):
            decoder.decode([PREAMBLE, evil])
        with pytest.raises(RemoteProtocolError):
            decoder.decode([evil, evil])
    with pytest.raises(RemoteProtocolError):
        codec.decode_chat(evil)
    result = encode(
        TaskResult(
            epoch=Epoch(1),
            step=StepNumber(1),
            timings=(StageTime(compute_us=1, layers_us=0, queued_us=0),),
            tensors=(TensorSpec("uint8", (len(evil),)),),
        ),
        [evil],
    )
    assert codec.to_coordinator.decode(result)[1] == (evil,)  # a tensor is but bytes
    assert not mark.exists()


# ------------------------------------------------------------------ fields (M13, M22)


def test_the_plain_heartbeat_is_read() -> None:
    assert read(HEARTBEAT) == Heartbeat(
        epochs=(Epoch(7),), progress_age_s=0.5, tasks_waiting=1, memory_used_bytes=2, kv_bytes=3
    )


@pytest.mark.parametrize("value", [True, 1.0, 0.5, -1, 2**53 + 1, 2**64 - 1, None, "1", [1], {}])
def test_a_count_is_a_bounded_integer(value: object) -> None:
    assert "$.tasks_waiting" in refuse("bad_field", {**HEARTBEAT, "tasks_waiting": value})


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -0.1, 1e10, -1, 2**64 - 1, True, None, "1"]
)
def test_seconds_are_a_bounded_number(value: object) -> None:
    assert "$.progress_age_s" in refuse("bad_field", {**HEARTBEAT, "progress_age_s": value})


def test_the_bounds_themselves_are_read() -> None:
    edge = {**HEARTBEAT, "kv_bytes": 2**53, "tasks_waiting": 0, "progress_age_s": 1e9}
    assert read(edge).kv_bytes == 2**53
    assert read({**HEARTBEAT, "progress_age_s": 3}).progress_age_s == 3.0


def test_nan_is_refused_in_sampling_parameters() -> None:
    generate = plain(example(Generate))
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        for value in (math.nan, math.inf, -1.0):
            broken = {**generate, "params": {name: value}}
            assert f"$.params.{name}" in refuse("bad_field", broken, bytes(24))
    assert read({**generate, "params": {"temperature": 0.5}}, bytes(24)).params.temperature == 0.5


def task_with(**slice_fields: object) -> dict[str, Any]:
    """A task of one slice, as plain values; `slice_fields` are by name, in their order."""
    part = {"id": 7, "start": 2, "tokens": 3, "sample": True, **slice_fields}
    task = plain(example(Task))
    return {**task, "sequences": [list(part.values())]}


def test_slices_and_times_travel_as_arrays() -> None:
    assert plain(example(Task))["sequences"][0][:4] == [300, 300, 300, True]
    short = task_with()
    (part,) = read(short, bytes(24), decoder=codec.to_worker).sequences
    assert part == SequenceSlice(sequence_id=SequenceId(7), start=2, num_tokens=3, sample=True)
    shared = task_with(sampling=None, prefix=[5, 2, True])
    for decoder in (codec.to_worker, codec.to_next_worker):
        (part,) = read(shared, bytes(24), decoder=decoder).sequences
        assert part.sampling is None
        assert part.prefix == SharedPrefix(sequence_id=SequenceId(5), length=2, take=True)


@pytest.mark.parametrize(
    "part",
    [
        [],
        [7],
        [7, 2],
        [7, 2, 0],
        [-1, 2, 3],
        [7, 2, 2**31],
        [7, 2, 3, 1],
        [7, 2, 3, True, None, None, 0],
        [7, 2, 3, True, {"temperature": -1.0}],
        [7, 2, 3, True, {"nonsense": 1}],
        [7, 2, 3, True, {"logit_bias": [[1, 0.5]] * 301}],
        [7, 2, 3, True, {"logit_bias": [[1]]}],
        [7, 2, 3, True, {"logit_bias": [[1, 0.5, 2]]}],
        [7, 2, 3, True, {"logit_bias": [[-1, 0.5]]}],
        [7, 2, 3, True, {"logit_bias": [[1, math.nan]]}],
        [7, 2, 3, True, None, [5]],
        [7, 2, 3, True, None, [5, 0]],
        [7, 2, 3, True, None, [5, 2, True, 1]],
        {"sequence_id": 7, "start": 2, "num_tokens": 3},
        None,
        7,
    ],
    ids=lambda part: str(part)[:40],
)
def test_a_slice_that_is_none_is_refused(part: object) -> None:
    task = {**task_with(), "sequences": [part]}
    for decoder in (codec.to_worker, codec.to_next_worker):
        assert "$.sequences[0]" in refuse("bad_field", task, bytes(24), decoder=decoder)


def test_a_task_has_one_to_512_slices() -> None:
    task = task_with()
    most = {**task, "sequences": task["sequences"] * MAX_SLICES}
    assert len(read(most, bytes(24), decoder=codec.to_worker).sequences) == MAX_SLICES
    for count in (0, MAX_SLICES + 1):
        wrong = {**task, "sequences": task["sequences"] * count}
        assert "$.sequences" in refuse("bad_field", wrong, bytes(24), decoder=codec.to_worker)


@pytest.mark.parametrize(
    "times", [[], [[1, 2]], [[1, 1, -1]], [[1.5, 2, 3]], [[1, 2, 3, 4]], [[1, 2, 2**60]], 1]
)
def test_times_are_triples_of_microseconds(times: object) -> None:
    result = plain(example(TaskResult))
    times_read = read({**result, "timings": [[1, 1, 2]]}, bytes(24)).timings
    assert times_read == (StageTime(compute_us=1, layers_us=1, queued_us=2),)
    assert "$.timings" in refuse("bad_field", {**result, "timings": times}, bytes(24))


@pytest.mark.parametrize(
    "bias",
    [{-1: 0.5}, {2**31: 0.5}, {"1": 0.5}, {1.0: 0.5}, {1: 1001.0}, {1: math.nan}, {1: None}, []],
    ids=str,
)
def test_a_logit_bias_is_a_bounded_table(bias: object) -> None:
    generate = plain(example(Generate))
    most = {**generate, "params": {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIASES), 1.5)}}
    assert read(most, bytes(24)).params.logit_bias == dict.fromkeys(range(MAX_LOGIT_BIASES), 1.5)
    for wrong in (bias, dict.fromkeys(range(MAX_LOGIT_BIASES + 1), 1.5)):
        broken = {**generate, "params": {"logit_bias": wrong}}
        assert "logit_bias" in refuse("bad_field", broken, bytes(24))


@pytest.mark.parametrize(
    "logprobs",
    [
        [[]],
        [[0.5]],
        [[math.nan]],
        [[-1.0, [[1]]]],
        [[-1.0, [[1, -1.0]] * 21]],
        [[-1.0, [], 1]],
        [[-1.0, [], [1]]],
        [[-1.0, [], [[b"x" * 257]]]],
        [[-1.0, [], [["x"]]]],
        [[-1.0, [], [None] * 22]],
        [[-1.0, [], [], 1]],
    ],
    ids=lambda value: str(value)[:30],
)
def test_log_probabilities_are_pairs(logprobs: object) -> None:
    chunk = plain(example(TokenChunk))
    said = [[-1.0, [[7, -1.0], [8, -2.5]], [[b"\xc3"], [b"<s>", False], None]], [-0.5]]
    read_back = read({**chunk, "logprobs": said}, decoder=codec.to_client).logprobs
    assert read_back == (
        TokenLogprobs(
            logprob=-1.0,
            top=((7, -1.0), (8, -2.5)),
            spelled=(Spelling(written=b"\xc3"), Spelling(written=b"<s>", is_text=False), None),
        ),
        TokenLogprobs(logprob=-0.5),
    )
    wrong = {**chunk, "logprobs": logprobs}
    assert "$.logprobs" in refuse("bad_field", wrong, decoder=codec.to_client)


@pytest.mark.parametrize("addresses", [["a:1"] * 17, [""], ["x" * 257], [1], "a:1", None])
def test_peer_addresses_are_few_and_short(addresses: object) -> None:
    hello = plain(example(WorkerHello))
    assert read({**hello, "peer_addresses": ["a:1"] * 16}).peer_addresses == ("a:1",) * 16
    assert "$.peer_addresses" in refuse("bad_field", {**hello, "peer_addresses": addresses})


@every_message
def test_fields_are_neither_missing_nor_more(
    decoder: Decoder[Message], kind: type[Message]
) -> None:
    message = example(kind)
    fields = plain(message)
    tensors = example_frames(message)
    assert read(fields, *tensors, decoder=decoder) == message
    required = [
        field.name
        for field in msgspec.structs.fields(kind)
        if field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT
    ]
    for name in required:
        without = {key: value for key, value in fields.items() if key != name}
        assert f"`{name}`" in refuse("bad_field", without, *tensors, decoder=decoder)
    refuse("bad_field", {**fields, "extra": 1}, *tensors, decoder=decoder)
    refuse("bad_field", {**fields, 7: 1}, *tensors, decoder=decoder)


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"type": "no_such_message"},
        {"type": "Goodbye"},
        {"type": 1},
        {"type": None},
        {"type": ["goodbye"]},
        [],
        ["goodbye"],
        "goodbye",
        0,
        None,
        True,
    ],
    ids=repr,
)
def test_an_unknown_type_is_refused(header: object) -> None:
    assert read({"type": "goodbye"}) == Goodbye()
    refuse("bad_field", header)


@every_message
def test_a_message_of_another_direction_is_refused(
    decoder: Decoder[Message], kind: type[Message]
) -> None:
    message = example(kind)
    frames = encode(message, example_frames(message))
    assert decoder.decode(frames)[0] == message
    for other in {other for other, _ in CASES} - {one for one, known in CASES if known is kind}:
        with pytest.raises(RemoteProtocolError) as caught:
            other.decode(frames)
        assert caught.value.reason == "bad_field"


def test_of_a_repeated_key_only_the_last_counts_and_it_is_checked() -> None:
    once = msgpack.packb(HEARTBEAT)
    assert once[0] == 0x80 + len(HEARTBEAT)

    def twice(key: str, value: object) -> bytes:
        return b"".join([bytes([once[0] + 1]), once[1:], msgpack.packb(key), msgpack.packb(value)])

    assert read(twice("kv_bytes", 9)).kv_bytes == 9
    refuse("bad_field", twice("kv_bytes", -1))
    refuse("bad_field", twice("type", "goodbye"))


@pytest.mark.parametrize(
    "name", ["", "x" * 65, "a b", "a\n", "a\0", "../a", ".a", "é", "a" * 60_000]
)
def test_names_are_short_and_plain(name: str) -> None:
    hello = plain(example(WorkerHello))
    assert read({**hello, "name": "gpu-0.lan_1"}).name == "gpu-0.lan_1"
    assert "$.name" in refuse("bad_field", {**hello, "name": name})
    cancel = {"type": "cancel", "request_id": "a-_0"}
    assert read(cancel).request_id == "a-_0"
    assert "$.request_id" in refuse("bad_field", {**cancel, "request_id": name})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("memory_bytes", -1),
        ("memory_bytes", 2**60),
        ("cores", 0),
        ("threads", 10**6),
        ("flops_per_s", 0.0),
        ("flops_per_s", math.nan),
        ("memory_bandwidth_bytes_per_s", math.inf),
        ("device_name", "x" * 257),
    ],
)
def test_boasting_workers_are_refused(field: str, value: object) -> None:
    hello = plain(example(WorkerHello))
    assert isinstance(read(hello), WorkerHello)
    boast = {**hello, "capabilities": {**hello["capabilities"], field: value}}
    assert f"$.capabilities.{field}" in refuse("bad_field", boast)


# ------------------------------------------------------------------ tensors (T1, T2, T3)


def result_with(dtype: object, shape: object, *, count: int = 1) -> dict[str, Any]:
    spec = [dtype, shape]
    return {**plain(example(TaskResult)), "tensors": [spec] * count}


@pytest.mark.parametrize(
    "dtype",
    ["O", "V8", ">f4", "<f4", "M8[ns]", "i4,(10**9)i8", "load", "float8_x", "float64", "", 4, None],
)
def test_dtypes_are_of_a_fixed_table(dtype: object) -> None:
    assert isinstance(read(result_with("float32", [2, 3]), bytes(24)), TaskResult)
    assert "$.tensors[0][0]" in refuse("bad_field", result_with(dtype, [2, 3]), bytes(24))


@pytest.mark.parametrize(
    "shape",
    [
        [],
        [0],
        [-1],
        [2, -1],
        [2, 0],
        [True],
        [4.0],
        [2**62],
        [2**64 - 1],
        [MAX_FRAME_BYTES + 1],
        [1] * 5,
        [1] * 65,
        [2**28] * 4,
        [2**14, 2**13],
        None,
        "6",
        6,
    ],
    ids=lambda shape: str(shape)[:30],
)
def test_shapes_are_small_and_positive(shape: object) -> None:
    assert isinstance(read(result_with("float32", [1, 2, 3, 1]), bytes(24)), TaskResult)
    assert "$.tensors[0]" in refuse("bad_field", result_with("float32", shape), bytes(24))


@pytest.mark.parametrize("length", [0, 1, 23, 25, 48])
def test_a_frame_has_exactly_the_size_of_its_spec(length: int) -> None:
    assert isinstance(read(result_with("float32", [2, 3]), bytes(24)), TaskResult)
    refuse("tensor_size_mismatch", result_with("float32", [2, 3]), bytes(length))


def test_a_message_has_a_limited_number_of_tensors() -> None:
    most = result_with("uint8", [1], count=MAX_TENSORS)
    assert len(read(most, *[b"x"] * MAX_TENSORS).tensors) == MAX_TENSORS
    refuse("bad_field", result_with("uint8", [1], count=MAX_TENSORS + 1), *[b"x"] * MAX_TENSORS)


def test_a_received_tensor_keeps_its_bytes() -> None:
    sent = bytes(range(24))
    frames = encode(example(TaskResult), [sent])
    assert codec.to_coordinator.decode(frames)[1] == (sent,)


# ------------------------------------------------------------------ payloads


@pytest.mark.parametrize(
    "chat",
    [
        [{"role": "root", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": "x", "mood": "y"}],
        [{"role": "user", "content": b"x"}],
        [{"role": "user", "content": None}],
        [["user", "x"]],
        {"role": "user", "content": "x"},
        "x",
        None,
    ],
    ids=repr,
)
def test_a_conversation_is_turns_of_known_roles(chat: object) -> None:
    good = msgpack.packb({"messages": [{"role": "user", "content": "x"}]})
    assert codec.decode_chat(good) == chat_of(ChatMessage(role="user", content="x"))
    with pytest.raises(RemoteProtocolError) as caught:
        codec.decode_chat(msgpack.packb({"messages": chat}))
    assert caught.value.reason == "bad_field"


def test_a_conversation_has_a_limited_number_of_turns() -> None:
    turn = ChatMessage(role="user", content="")
    most = encode_payload(chat_of(*[turn] * MAX_CHAT_MESSAGES))
    assert len(codec.decode_chat(most).messages) == MAX_CHAT_MESSAGES
    with pytest.raises(RemoteProtocolError) as caught:
        codec.decode_chat(encode_payload(chat_of(*[turn] * (MAX_CHAT_MESSAGES + 1))))
    assert caught.value.reason == "bad_field"


def test_a_status_has_the_fields_it_has() -> None:
    status = plain(example(ClusterStatus))
    assert codec.decode_status(msgpack.packb(status)) == example(ClusterStatus)
    for broken in (
        {**status, "state": "dead"},
        {**status, "epoch": -1},
        {**status, "extra": 1},
        {**status, "rejected": {"x": -1}},
        {key: value for key, value in status.items() if key != "workers"},
    ):
        with pytest.raises(RemoteProtocolError) as caught:
            codec.decode_status(msgpack.packb(broken))
        assert caught.value.reason == "bad_field"


def test_a_payload_is_measured_before_it_is_decoded() -> None:
    turn = ChatMessage(role="user", content="")
    room = MAX_PAYLOAD_BYTES - len(encode_payload(chat_of(turn))) - 4  # a long text's prefix
    fits = encode_payload(chat_of(ChatMessage(role="user", content="x" * room)))
    assert len(fits) == MAX_PAYLOAD_BYTES
    assert len(codec.decode_chat(fits).messages[0].content) == room
    exceeds = encode_payload(chat_of(ChatMessage(role="user", content="x" * (room + 1))))
    with pytest.raises(RemoteProtocolError) as caught:
        codec.decode_chat(exceeds)
    assert caught.value.reason == "payload_too_big"


# ------------------------------------------------------------------ our own mistakes


def test_we_do_not_send_too_long_a_header() -> None:
    assert encode(RequestFailed(request_id="r", code="c", message="x" * 60_000))
    with pytest.raises(LocalProtocolError, match="RequestFailed"):
        encode(RequestFailed(request_id="r", code="c", message="x" * 66_000))


def test_we_do_not_send_frames_that_the_message_does_not_name() -> None:
    result = example(TaskResult)
    assert encode(result, [bytes(24)])
    for frames in ([], [bytes(23)], [bytes(25)], [bytes(24), b""], [b"", bytes(24)]):
        with pytest.raises(LocalProtocolError, match="TaskResult"):
            encode(result, frames)
    with pytest.raises(LocalProtocolError, match="Welcome"):
        encode(example(Welcome), [b""])


# ------------------------------------------------------------------ what is left of a bad message


def outline_of(header: dict[str, Any], *tensors: bytes) -> Outline:
    with pytest.raises(RemoteProtocolError) as caught:
        codec.to_worker.decode([PREAMBLE, msgpack.packb(header), *tensors])
    return caught.value.outline


def test_what_names_the_step_is_read_though_the_rest_cannot() -> None:
    task = plain(example(Task))
    whole = Outline(type="task", epoch=task["epoch"], step=task["step"])
    assert outline_of({**task, "unheard_of": [{}] * 9}) == whole
    assert outline_of({**task, "sequences": 7}) == whole
    assert outline_of(task) == whole  # its tensors are missing
    assert outline_of({"type": "of_the_future", "epoch": 3}) == Outline("of_the_future", Epoch(3))
    for spoiled in ({"epoch": -1}, {"epoch": "x"}, {"step": 2**60}, {"type": "x" * 65}):
        assert outline_of({**task, "sequences": 7, **spoiled}) == Outline()
    with pytest.raises(RemoteProtocolError) as caught:
        codec.to_worker.decode([PREAMBLE, b"noise"])
    assert caught.value.outline == Outline()
