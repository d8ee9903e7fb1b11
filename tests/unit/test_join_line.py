"""The lines by which machines join: written, read, and refused without showing the secret."""

import pytest

from distributed_llm.common.errors import ConfigError
from distributed_llm.common.join_line import JoinLine, parse_join_line
from distributed_llm.common.keys import PublicKey, key_text

SERVER = PublicKey(key_text(bytes(range(32))))
SECRET = key_text(bytes(range(32, 64)))


@pytest.mark.parametrize("address", ["192.168.1.20:5555", "pc.local:1", "[::1]:5555"])
def test_what_is_written_is_read_again(address: str) -> None:
    line = JoinLine(address, SERVER, SECRET)
    assert parse_join_line(f" {line}\n") == line
    assert str(line) == f"dllm://{address}/{SERVER}.{SECRET}"
    assert SECRET not in repr(line)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dllm://",
        f"dllm://pc:5555/{SERVER}",
        f"dllm://pc:5555/{SERVER}.{SECRET[:-1]}",
        f"dllm://pc:5555/{SERVER}.{SECRET}x",
        f"dllm://pc:5555/{SERVER}.{SECRET[:-1]}!",
        f"dllm://pc:5555/{SERVER}.{'é' * 43}",
        f"dllm://pc/{SERVER}.{SECRET}",
        f"dllm://pc:99999/{SERVER}.{SECRET}",
        f"dllm://::1:5555/{SERVER}.{SECRET}",
        f"http://pc:5555/{SERVER}.{SECRET}",
        f"pc:5555/{SERVER}.{SECRET}",
    ],
)
def test_what_is_no_line_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError, match=r"no line to join with.*dllm token create") as caught:
        parse_join_line(text)
    assert SECRET[:-1] not in str(caught.value)
