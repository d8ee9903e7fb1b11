"""Chat templates as models have them: in several files, several of them, and without a system."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from distributed_llm.api.chat.parsing.formats import detect_formats
from distributed_llm.client.prompts import encode_chat
from distributed_llm.common.codec import decode_chat
from distributed_llm.common.errors import InvalidRequest
from distributed_llm.coordinator.text.tokenizer import Tokenizer
from tests.unit.made_tokenizers import byte_level, save

USER = {"role": "user", "content": "hello é"}
SYSTEM = {"role": "system", "content": " be brief\n"}
ASSISTANT = {"role": "assistant", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
DOCUMENTS = [{"title": "Tea", "text": "is hot"}]

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TOOL_USE = "<tool_call>{{ tools | tojson }}" + PLAIN
RAG = "{% for d in documents %}{{ d.title }}: {{ d.text }}\n{% endfor %}" + PLAIN
TEMPLATES = {"default": PLAIN, "tool_use": TOOL_USE, "rag": RAG}


def asked(folder: Path, messages: Any, **more: Any) -> list[int]:
    """Return the token ids of a conversation that a client sends."""
    prompt = encode_chat(messages, **more)
    return Tokenizer.load(folder).encode_chat(decode_chat(prompt.frames[0]))


def expected(folder: Path, messages: Any, **arguments: Any) -> list[int]:
    """Return what transformers makes of it."""
    return list(
        AutoTokenizer.from_pretrained(folder).apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **arguments
        )
    )


# ------------------------------------------------------------------ where templates are


def in_the_config(folder: Path, template: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


def listed(folder: Path) -> None:
    in_the_config(folder, [{"name": n, "template": t} for n, t in TEMPLATES.items()])


def beside_the_config(folder: Path) -> None:
    in_the_config(folder, "older")
    (folder / "chat_template.jinja").write_text(PLAIN)
    others = folder / "additional_chat_templates"
    others.mkdir()
    for name in ("tool_use", "rag"):
        (others / f"{name}.jinja").write_text(TEMPLATES[name])


@pytest.mark.parametrize("write", [listed, beside_the_config])
def test_of_several_templates_the_right_one_is_taken(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    folder = save(tmp_path, byte_level())
    write(folder)
    assert asked(folder, [USER]) == expected(folder, [USER], chat_template=PLAIN)
    wanted = expected(folder, [USER], tools=[TOOL])
    assert asked(folder, [USER], tools=[TOOL]) == wanted
    assert wanted == expected(folder, [USER], tools=[TOOL], chat_template=TOOL_USE)
    given = {"documents": DOCUMENTS}
    wanted = expected(folder, [USER], documents=DOCUMENTS, chat_template="rag")
    assert asked(folder, [USER], template_arguments=given) == wanted
    with pytest.raises(InvalidRequest, match="knows no argument 'documents'"):
        asked(folder, [USER], tools=[TOOL], template_arguments=given)
    facts = Tokenizer.load(folder).facts()
    assert (facts.chat_template, facts.tool_template) == (PLAIN, TOOL_USE)
    assert detect_formats(facts.chat_template, facts.tool_template).tagged_calls


def test_several_templates_without_a_usual_one(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level())
    in_the_config(folder, [{"name": "tool_use", "template": TOOL_USE}])
    assert asked(folder, [USER], tools=[TOOL]) == expected(folder, [USER], tools=[TOOL])
    with pytest.raises(InvalidRequest, match=r"no default.*tool_use"):
        asked(folder, [USER])
    assert Tokenizer.load(folder).facts().chat_template is None


def test_a_template_of_a_multimodal_model_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level())
    path = folder / "chat_template.json"
    path.write_text(json.dumps({"chat_template": PLAIN}))
    assert asked(folder, [USER]) == expected(folder, [USER], chat_template=PLAIN)
    path.write_text(json.dumps({"chat_template": 3}))
    assert Tokenizer.load(folder).facts().chat_template is None
    (folder / "chat_template.jinja").write_text(RAG)
    assert Tokenizer.load(folder).facts().chat_template == RAG


# ------------------------------------------------------------------ templates without a system

REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<s>{{ m.role }}\n{{ m.content | trim }}\n{% endfor %}"
)
LEAVES_OUT = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}"
    "{% elif m.role == 'assistant' %}</s>{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [REFUSES, LEAVES_OUT], ids=["refuses", "leaves-out"])
@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_user_says_what_no_system_can(tmp_path: Path, template: str, role: str) -> None:
    folder = save(tmp_path, byte_level(), chat_template=template)
    messages = [{**SYSTEM, "role": role}, USER, ASSISTANT, USER]
    together = {"role": "user", "content": " be brief\n\n\nhello é"}
    assert asked(folder, messages) == expected(folder, [together, ASSISTANT, USER])
    nothing = [{"role": role, "content": " "}, USER]
    if template == REFUSES:
        assert asked(folder, nothing) == expected(folder, [USER])


@pytest.mark.parametrize(
    "messages",
    [[SYSTEM], [SYSTEM, ASSISTANT], [SYSTEM, USER, USER], [SYSTEM, SYSTEM, USER]],
    ids=["alone", "no user", "not in turn", "two"],
)
def test_what_is_refused_all_the_same_is_refused_in_the_templates_words(
    tmp_path: Path, messages: Any
) -> None:
    folder = save(tmp_path, byte_level(), chat_template=REFUSES)
    with pytest.raises(InvalidRequest, match=r"template refuses.*System role not supported"):
        asked(folder, messages)


@pytest.mark.parametrize(
    "template",
    [
        PLAIN,
        "{{ messages | tojson }}",  # neither way has the words as they are
        "{{ messages[0].content | trim }}{{ messages[1].content }}",
    ],
)
def test_a_template_that_knows_the_system_gets_it(tmp_path: Path, template: str) -> None:
    folder = save(tmp_path, byte_level(), chat_template=template)
    messages = [{**SYSTEM, "content": '"be" brief\n'}, USER]
    assert asked(folder, messages) == expected(folder, messages)


# ------------------------------------------------------------------ calls of tools

CALL = {"name": "weather", "arguments": {"place": "Köln"}}
CALLS = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
WANTS_TEXT = CALLS + "{{ '<call>' + c.function.arguments + '</call>' }}{% endfor %}{% endfor %}"
WANTS_FIELDS = CALLS + "{{ c.function.arguments.items() | list }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "be brief"}]])
@pytest.mark.parametrize("refuses", [False, True])
def test_arguments_of_calls_are_what_the_template_takes(
    tmp_path: Path, system: list[Any], refuses: bool
) -> None:
    begins = REFUSES.partition("{% for")[0] if refuses else ""
    call = {"type": "function", "function": CALL}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    as_text = {**CALL, "arguments": '{"place":"Köln"}'}
    called_with_text = {**called, "tool_calls": [{**call, "function": as_text}]}
    first = USER
    if system and refuses:
        system, first = [], {"role": "user", "content": f"be brief\n\n{USER['content']}"}
    asked_for = [{"role": "system", "content": "be brief"}] if first is not USER else system
    fields = save(tmp_path / "fields", byte_level(), chat_template=begins + WANTS_FIELDS)
    wanted = expected(fields, [*system, first, called])
    assert asked(fields, [*asked_for, USER, called]) == wanted
    text = save(tmp_path / "text", byte_level(), chat_template=begins + WANTS_TEXT)
    wanted = expected(text, [*system, first, called_with_text])
    assert asked(text, [*asked_for, USER, called]) == wanted
