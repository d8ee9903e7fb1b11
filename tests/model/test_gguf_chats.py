"""Tokenizers and chat templates of GGUF files, of families whose marks are tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import GemmaTokenizer

from distributed_llm.common.messages import Chat, ChatMessage
from distributed_llm.coordinator.text.tokenizer import Tokenizer
from distributed_llm.gguf_texts.generation import end_tokens
from distributed_llm.gguf_texts.header import Header, read_files
from distributed_llm.gguf_texts.tokenizer import write_tokenizer

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
HELLO = Chat(messages=(ChatMessage(role="user", content="hi you"),))
HARMONY = (
    "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>"
    "{% endfor %}<|start|>assistant"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ m['role'] }}\n{{ m['content'] }}<turn|>\n"
    "{% endfor %}<|turn>model\n"
)


def file_of(
    path: Path, architecture: str, tokens: Sequence[str], types: Sequence[int], **fields: Any
) -> Header:
    """Return the header of a file that has little but a vocabulary."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
    for name, value in fields.items():
        name = f"tokenizer.{name.replace('__', '.')}"
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_files([path])


@pytest.mark.parametrize(("architecture", "way"), [("gpt-oss", "gpt-4o"), ("gptoss", "default")])
def test_marks_of_gpt_oss(tmp_path: Path, architecture: str, way: str) -> None:
    marks = ["<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|channel|>"]
    letters = [*map(chr, range(ord("!"), ord("~") + 1)), "\u0120", "hi"]
    header = file_of(
        tmp_path / "m.gguf",
        architecture,
        [*letters, *marks],
        [NORMAL] * len(letters) + [CONTROL] * len(marks),
        ggml__model="gpt2",
        ggml__pre=way,
        ggml__merges=["h i"],
        ggml__eos_token_id=letters.index("!"),
        chat_template=HARMONY,
    )
    write_tokenizer(header, tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode_chat(HELLO)
    first = len(letters)
    assert [token - first for token in ids if token >= first] == [0, 1, 2, 0]
    assert len(ids) == len("<user<*_you<<assistant")
    assert {first + 3, first + 4} <= set(end_tokens(header))


@pytest.mark.parametrize(("model", "way"), [("gemma4", None), ("llama", "gemma4")])
def test_text_and_chats_of_gemma4(tmp_path: Path, model: str, way: str | None) -> None:
    """Files of llama.cpp, and of ollama."""
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>"]
    in_bytes = [f"<0x{number:02X}>" for number in range(256)]
    letters = [*"abcdehilmoruy", "\u2581", "\n", "he", "hell", "ll", "\u2581\u2581"]
    merges = ["h e", "l l", "he ll", "\u2581 \u2581"]
    tokens = [*marks, *in_bytes, *letters]
    fields: dict[str, Any] = {} if way is None else {"ggml__pre": way}
    header = file_of(
        tmp_path / "m.gguf",
        "gemma4",
        tokens,
        [CONTROL] * len(marks) + [BYTE] * 256 + [NORMAL] * len(letters),
        ggml__model=model,
        ggml__scores=[-1000.0] * len(tokens),
        ggml__merges=merges,
        ggml__bos_token_id=2,
        ggml__eos_token_id=1,
        ggml__unknown_token_id=3,
        ggml__add_bos_token=True,
        chat_template=GEMMA,
        **fields,
    )
    write_tokenizer(header, tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    vocab = {token: number for number, token in enumerate(tokens)}
    made: Any = GemmaTokenizer
    theirs = made(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges])
    for text in ("hello  hell", " hi\nyou é", ""):
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer.encode_chat(HELLO)
    assert ids[:2] == [2, 5]  # the template alone begins the text
    assert [token for token in ids if token < len(marks)] == [2, 5, 6, 5]
    assert 6 in end_tokens(header)
